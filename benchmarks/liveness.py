"""How fast `/health/live` answers while requests decode.

    python -m benchmarks.liveness

Starts a server of its own in another process, keeps `--requests` streams of the bare backbone
decoding on it, and asks `/health/live` every `--every` seconds from a process that does nothing
else.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import options
from benchmarks.serving import Served, serving
from benchmarks.streams import decoding
from benchmarks.timing import quantile


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    requests: Annotated[int, typer.Option(help="Streams that decode")] = 64,
    seconds: Annotated[float, typer.Option(help="How long is asked")] = 20.0,
    every: Annotated[float, typer.Option(help="Seconds from one question to the next")] = 0.02,
    threads: Annotated[int, typer.Option(help="Compute threads of the server")] = 1,
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder), "--threads", str(threads)) as served,
    ):
        idle = _measured(served, seconds / 4, every)
        with decoding(served, requests, tasks=["base"]):
            busy = _measured(served, seconds, every)
            assert served.running() == requests, "a stream ended before the questions did"
    print(f"idle:                  {_summary(idle)}")
    print(f"{requests:3} requests decoding: {_summary(busy)}")


def _measured(served: Served, seconds: float, every: float) -> list[float]:
    """Seconds of each answer, asked for in a process that nothing else disturbs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ask_again_and_again, (served, seconds, every))


def ask_again_and_again(served: Served, seconds: float, every: float) -> list[float]:
    """Public, for the other process must find it by its name."""
    found, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        status, _ = served.call("GET", "/health/live")
        assert status == 200
        found.append(time.perf_counter() - began)
        time.sleep(max(0.0, every - found[-1]))
    return found


def _summary(seconds: list[float]) -> str:
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "longest": 1.0}
    found = [f"{name} {1000 * quantile(seconds, share):6.1f} ms" for name, share in shares.items()]
    return f"{', '.join(found)} of {len(seconds)} answers"


if __name__ == "__main__":
    typer.run(main)
