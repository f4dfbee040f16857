"""What a running fit costs those who are served: latency between tokens, and throughput.

    python -m benchmarks.fit_lane

Starts a server of its own. Windows with and without a fit take turns; in each, the same number of
streams decodes over the demo's tasks, the requests sent anew. A fit that ends within its window
voids the run. At the end the fit's own pace is measured with nobody else there.
"""

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.serving import TICKS, Served, serving
from benchmarks.streams import decoding
from benchmarks.timing import quantile

P99_GOAL = 1.25
STEPS = 10_000
SIDES = ("alone", "beside a fit")


@dataclass(frozen=True)
class Window:
    """What one stretch of time has shown."""

    gaps: list[float]  # seconds between two tokens of a stream
    rate: float  # tokens a second, over all streams
    cores: float  # that the fit took on the average
    pace: float  # steps of the fit a second


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    streams: Annotated[int, typer.Option(help="Streams that decode")] = 8,
    rounds: int = 4,
    seconds: Annotated[float, typer.Option(help="Length of a window")] = 20.0,
    threads: Annotated[int, typer.Option(help="Compute threads of the server")] = 1,
    share: Annotated[float, typer.Option(help="The server's --fit-share")] = 0.3,
    examples: Annotated[int, typer.Option(help="Examples of the fit")] = 32,
) -> None:
    console = Console(width=110)
    flags = ("--threads", str(threads), "--fit-share", str(share))
    windows: dict[str, list[Window]] = {side: [] for side in SIDES}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder), *flags) as served,
    ):
        _submit(served, examples)  # the worker loads now, not in a window
        for number in range(rounds):
            for side, kept in windows.items():
                with fitting(served, examples) if side == SIDES[1] else contextlib.nullcontext():
                    kept.append(_window(served, streams, seconds))
                console.log(f"round {number + 1}/{rounds}, {side}: {kept[-1].rate:.1f} tokens/s")
        with fitting(served, examples):
            idle = _fit_alone(served, seconds)
    console.print(f"{streams} streams, {threads} thread(s), {timing.machine()}")
    _print_windows(console, windows, share)
    busy = timing.spread([window.pace for window in windows[SIDES[1]]])
    console.print(f"steps of the fit a second: {busy} beside the streams, {idle:.3g} alone")


@contextlib.contextmanager
def fitting(served: Served, examples: int) -> Iterator[None]:
    """A fit that computes for as long as the block lasts."""
    job = _submit(served, examples)
    yield
    found = served.get(f"/jobs/{job}")
    assert found["state"] == "running", found
    assert served.call("POST", f"/jobs/{job}/cancel")[0] == 200


def _submit(served: Served, count: int) -> str:
    """The id of a job that has begun to compute; of those before it, none does any more."""
    for job in served.get("/jobs?state=running")["jobs"]:
        served.call("POST", f"/jobs/{job['id']}/cancel")
    pairs = [{"input": f"{n} plus {n + 3}", "output": str(2 * n + 3)} for n in range(count)]
    # So many steps that the first scores, which might end the fit early, lie far off.
    body = {"examples": pairs, "fit": {"method": "z", "steps": STEPS, "holdout": 0.1}}
    body["id"] = f"measured-{time.time_ns()}"
    status, data = served.call("POST", "/tasks", json.dumps(body).encode(), "application/json")
    assert status == 202, data
    job: str = json.loads(data)["id"]
    while served.get(f"/jobs/{job}")["progress"]["step"] < 1:
        time.sleep(0.2)
    return job


def _window(served: Served, streams: int, seconds: float) -> Window:
    with decoding(served, streams) as arrivals:
        begin, cpu, step = time.perf_counter(), _worker_cpu(served), _step(served)
        time.sleep(seconds)
        end, spent = time.perf_counter(), _worker_cpu(served) - cpu
        steps = _step(served) - step
        assert served.running() == streams, "a stream ended before its window did"
    inside = [[t for t in times if begin <= t <= end] for times in arrivals]
    gaps = [b - a for times in inside for a, b in itertools.pairwise(times)]
    passed = end - begin
    return Window(gaps, sum(map(len, inside)) / passed, spent / passed, steps / passed)


def _fit_alone(served: Served, seconds: float) -> float:
    """Steps a second."""
    time.sleep(2)
    begin, step = time.perf_counter(), _step(served)
    time.sleep(seconds)
    return (_step(served) - step) / (time.perf_counter() - begin)


def _step(served: Served) -> int:
    """Of the job that runs; 0 where none does."""
    jobs: list[Any] = served.get("/jobs?state=running")["jobs"]
    return sum(job["progress"]["step"] for job in jobs)


def _worker_cpu(served: Served) -> float:
    """CPU seconds of the server's child processes."""
    total = 0.0
    for listed in Path(f"/proc/{served.pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def _print_windows(console: Console, windows: dict[str, list[Window]], share: float) -> None:
    alone, beside = (windows[side] for side in SIDES)
    rows = [
        (
            side,
            timing.spread([1000 * quantile(w.gaps, 0.5) for w in kept]),
            timing.spread([1000 * quantile(w.gaps, 0.99) for w in kept]),
            timing.spread([w.rate for w in kept]),
            timing.spread([w.cores for w in kept]),
        )
        for side, kept in windows.items()
    ]
    columns = ("streams decode", "median ms", "p99 ms", "tokens / s", "cores of the fit")
    timing.print_table(console, "Gaps between tokens, and throughput", columns, rows)
    p99 = [[quantile(w.gaps, 0.99) for w in kept] for kept in (beside, alone)]
    rates = [[w.rate for w in kept] for kept in (beside, alone)]
    goals = [
        ("p99 gap", timing.ratio(*p99), f"<= {P99_GOAL}"),
        ("tokens / s", timing.ratio(*rates), f">= {1 - share:.2g}"),
    ]
    title = "Beside a fit over alone, round by round"
    timing.print_table(console, title, ("figure", "ratio", "goal"), goals)


if __name__ == "__main__":
    typer.run(main)
