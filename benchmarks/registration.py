"""How long `POST /tasks` takes, and how long the others wait for it.

    python -m benchmarks.registration

Starts a server of its own and registers random routings with logits for every module, as JSON and
as a safetensors file, from a process that does nothing else: on the idle server, then while streams
decode. Windows with and without registrations take turns, each with fresh streams.
"""

import contextlib
import http.client
import itertools
import json
import multiprocessing.pool
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.serving import Served, serving
from benchmarks.streams import decoding
from benchmarks.timing import quantile

FORMS = ("JSON", "safetensors")
BOUNDARY = "a-line-that-no-part-holds"
GOAL_SECONDS = 0.03
WARM_UP = 3
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Window:
    """What one stretch of time has shown, in seconds."""

    gaps: list[float]  # between two tokens of a stream
    latencies: list[float]  # of registrations


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    count: Annotated[int, typer.Option(help="Registrations of each form when idle")] = 100,
    streams: Annotated[int, typer.Option(help="Streams that decode")] = 16,
    rounds: int = 4,
    seconds: Annotated[float, typer.Option(help="Length of a window")] = 8.0,
    pause: Annotated[float, typer.Option(help="Seconds between registrations in a window")] = 0.1,
    threads: Annotated[int, typer.Option(help="Compute threads of the server")] = 1,
) -> None:
    console = Console(width=110)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = stack.enter_context(
            serving(backbone, inventory, folder, "--threads", str(threads))
        )
        found = served.get("/inventory")
        shape = (len(found["modules"]), found["heads"], found["skills"])
        idle = _idle(pool, served, shape, count)
        windows: dict[str, list[Window]] = {form: [] for form in ("none", *FORMS)}
        for number in range(rounds):
            for form, kept in windows.items():
                kept.append(_window(pool, served, shape, form, streams, seconds, pause))
                console.log(f"round {number + 1}/{rounds}, registering {form}")
    sizes = ", ".join(f"{form} {len(_call(form, shape, 0)[0]) / 1000:.0f} kB" for form in FORMS)
    console.print(f"{list(shape)} logits: {sizes}; {timing.machine()}")
    _print_latencies(console, idle, windows, streams)
    _print_gaps(console, windows)


def _idle(
    pool: multiprocessing.pool.Pool, served: Served, shape: Sequence[int], count: int
) -> dict[str, list[float]]:
    """Latencies in ten turns for each form."""
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for form in FORMS:
        pool.apply(register, (served.port, form, shape, next(NUMBERS), WARM_UP, 0.0, 60.0))
    for _ in range(10):
        for form, kept in found.items():
            turn = (served.port, form, shape, next(NUMBERS), count // 10, 0.02, 60.0)
            kept.extend(latencies(pool.apply(register, turn)))
    return found


def _window(
    pool: multiprocessing.pool.Pool,
    served: Served,
    shape: Sequence[int],
    form: str,
    streams: int,
    seconds: float,
    pause: float,
) -> Window:
    calls: list[tuple[float, float]] = []
    with decoding(served, streams) as arrivals:
        begin = time.perf_counter()
        if form in FORMS:
            count = int(seconds / pause)
            turn = (served.port, form, shape, next(NUMBERS), count, pause, seconds)
            calls = pool.apply(register, turn)
            begin = calls[0][0]
        else:
            time.sleep(seconds)
        end = time.perf_counter()
        assert served.running() == streams, "a stream ended before its window did"
    inside = [[t for t in times if begin <= t <= end] for times in arrivals]
    return Window(
        [b - a for times in inside for a, b in itertools.pairwise(times)], latencies(calls)
    )


def register(
    port: int, form: str, shape: Sequence[int], turn: int, count: int, pause: float, seconds: float
) -> list[tuple[float, float]]:
    """When each of `count` calls was sent and its whole 201 was there; ends after `seconds`.

    The bodies are made before the first call. The clock is the same in every process.
    """
    bodies = [_call(form, shape, 1000 * turn + number) for number in range(count)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    found: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    with contextlib.closing(connection):
        for body, kind in bodies:
            began = time.perf_counter()
            connection.request("POST", "/tasks", body, {"Content-Type": kind})
            answer = connection.getresponse()
            data = answer.read()
            found.append((began, time.perf_counter()))
            assert answer.status == 201, data
            if found[-1][1] > end:
                break
            time.sleep(pause)
    return found


def latencies(calls: Sequence[tuple[float, float]]) -> list[float]:
    return [answered - sent for sent, answered in calls]


def _call(form: str, shape: Sequence[int], number: int) -> tuple[bytes, str]:
    """Body and content type that register random logits as a new task."""
    logits = np.random.default_rng(number).standard_normal(tuple(shape), dtype=np.float32)
    task: dict[str, Any] = {"id": f"measured-{number}"}
    if form == "JSON":
        body = json.dumps({**task, "routing": {"logits": logits.tolist()}}).encode()
        return body, "application/json"
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="task"\r\n\r\n{json.dumps(task)}'
    file = (
        f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="routing"; filename="r"\r\n\r\n'
    )
    data = safetensors.numpy.save({"logits": logits})
    whole = f"{head}{file}".encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return whole, f"multipart/form-data; boundary={BOUNDARY}"


def _print_latencies(
    console: Console,
    idle: dict[str, list[float]],
    windows: dict[str, list[Window]],
    streams: int,
) -> None:
    busy = {form: [s for w in windows[form] for s in w.latencies] for form in FORMS}
    rows = [
        (
            form,
            state,
            str(len(found)),
            *(f"{1000 * quantile(found, q):.1f}" for q in (0.5, 0.99, 1)),
        )
        for state, sides in (("idle", idle), (f"{streams} decoding", busy))
        for form, found in sides.items()
    ]
    columns = ("form", "server", "calls", "median ms", "p99 ms", "longest ms")
    title = f"POST /tasks until its 201; goal: median <= {1000 * GOAL_SECONDS:.0f} ms"
    timing.print_table(console, title, columns, rows)


def _print_gaps(console: Console, windows: dict[str, list[Window]]) -> None:
    """Each window's figures in units of the median step of the same round's quiet window."""
    steps = [statistics.median(window.gaps) for window in windows["none"]]
    quiet = [max(window.gaps) / step for window, step in zip(windows["none"], steps, strict=True)]
    rows = []
    for form, kept in windows.items():
        pairs = list(zip(kept, steps, strict=True))
        longest = [max(window.gaps) / step for window, step in pairs]
        added = [most - without for most, without in zip(longest, quiet, strict=True)]
        rows.append(
            (
                form,
                timing.spread([statistics.median(window.gaps) / step for window, step in pairs]),
                timing.spread([quantile(window.gaps, 0.99) / step for window, step in pairs]),
                timing.spread(longest),
                timing.spread(added),
            )
        )
    step = timing.spread([1000 * step for step in steps])
    title = f"Gaps between tokens, in quiet median steps of {step} ms; goal: longest adds <= 1"
    columns = ("registering", "median", "p99", "longest", "longest, less the quiet one")
    timing.print_table(console, title, columns, rows)


if __name__ == "__main__":
    typer.run(main)
