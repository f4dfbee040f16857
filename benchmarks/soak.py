"""Whether a server that is worked, changed and left for long stays as it was.

    python -m benchmarks.soak --minutes 30

Calls, registrations, fits and disconnects at `--rate` a second; after the warm-up and at the end
they pause until the server rests. Fails where memory grows by more than `--limit` percent in ten
minutes, where a thread, a file, a seat or a pinned slot is left, and where an answer was wrong.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import options, timing
from benchmarks.serving import Served, serving
from benchmarks.soak_churn import Churn

STALL_SECONDS = 5.0
SAMPLE_SECONDS = 2.0
REST_SECONDS = 90.0
FLAGS = (
    *("--threads", "1", "--log-level", "warning"),
    *("--stream-stall-seconds", str(STALL_SECONDS), "--fit-idle-seconds", "5"),
    # Caches so small that they are full after the warm-up: they grow by demand, up to this.
    *("--prefix-cache-tokens", "1024", "--kv-cache-tokens", "4096", "--max-running", "16"),
)
GAUGES = ("num_requests_running", "num_requests_waiting", "private_adapters_pinned")


@dataclass(frozen=True)
class Rest:
    """What a server holds while nobody asks anything of it."""

    threads: int
    files: int
    children: int
    busy: float  # seats, line and pinned slots together


@dataclass(frozen=True)
class Sample:
    """Memory at a moment."""

    seconds: float
    anonymous: int  # bytes


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    minutes: Annotated[float, typer.Option(help="How long, the warm-up included")] = 30.0,
    warm_up: Annotated[float, typer.Option(help="Minutes before memory is watched")] = 10.0,
    rate: Annotated[float, typer.Option(help="Actions a second")] = 3.0,
    fit_every: Annotated[float, typer.Option(help="Seconds between two fits")] = 60.0,
    limit: Annotated[float, typer.Option(help="Percent that memory may grow in 10 minutes")] = 1.0,
    task: Annotated[str, typer.Option(help="A task of the inventory; none takes the first")] = "",
    seed: int = 0,
) -> None:
    task = task or _first_task(inventory)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder), *FLAGS) as served,
    ):
        churn = Churn(served.port, task, seed)
        found = asyncio.run(_soak(served, churn, minutes, warm_up, rate, fit_every))
    wrong = report(*found, churn, limit)
    sys.exit("\n".join(wrong) if wrong else 0)


def _first_task(inventory: Path) -> str:
    from polyhead.adapters.inventory import Inventory

    return min(Inventory.load(inventory).tasks)


async def _soak(
    served: Served, churn: Churn, minutes: float, warm_up: float, rate: float, fit_every: float
) -> tuple[Rest, Rest, list[Sample]]:
    await _busy(served, churn, warm_up * 60, rate, fit_every)
    first = await _rest(served, None)
    samples = await _busy(served, churn, (minutes - warm_up) * 60, rate, fit_every)
    last = await _rest(served, first)
    await churn.close()
    return first, last, samples


async def _busy(
    served: Served, churn: Churn, seconds: float, rate: float, fit_every: float
) -> list[Sample]:
    """Let clients act for a while; answers when the last of them is through."""
    samples: list[Sample] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        next_fit, next_sample = began, began
        while (now := time.monotonic()) < began + seconds:
            group.create_task(churn.act())
            if now >= next_fit:
                next_fit = now + fit_every
                group.create_task(churn.fit())
                group.create_task(churn.deaf(2 * STALL_SECONDS))
            if now >= next_sample:
                next_sample = now + SAMPLE_SECONDS
                samples.append(Sample(now - began, served.memory().anonymous))
            await asyncio.sleep(1 / rate)
    return samples


async def _rest(served: Served, before: Rest | None) -> Rest:
    """What is left once nothing runs: the worker of fits has gone, and idle connections too."""
    end = time.monotonic() + REST_SECONDS
    await asyncio.sleep(10)
    while True:
        found = await asyncio.to_thread(_look, served)
        rests = not (found.busy or found.children)
        if before is not None:
            rests = rests and found.files <= before.files and found.threads <= before.threads
        if rests or time.monotonic() > end:
            return found
        await asyncio.sleep(1)


def _look(served: Served) -> Rest:
    lines = served.call("GET", "/metrics")[1].decode().splitlines()
    names = tuple(f"polyhead_{name} " for name in GAUGES)
    process = Path(f"/proc/{served.pid}")
    children = [file.read_text().split() for file in process.glob("task/*/children")]
    return Rest(
        threads=len(os.listdir(process / "task")),
        files=len(os.listdir(process / "fd")),
        children=sum(map(len, children)),
        busy=sum(float(line.split()[1]) for line in lines if line.startswith(names)),
    )


def slope(samples: list[Sample]) -> float:
    """Growth in percent of the mean in 10 minutes, by least squares."""
    sizes = [sample.anonymous for sample in samples]
    line = statistics.linear_regression([sample.seconds for sample in samples], sizes)
    return 100 * 600 * line.slope / statistics.mean(sizes)


def report(first: Rest, last: Rest, samples: list[Sample], churn: Churn, limit: float) -> list[str]:
    """Print the figures. Returns what is wrong with them."""
    grown = slope(samples)
    sizes = [sample.anonymous / 2**20 for sample in samples]
    print(timing.machine())
    print("actions:", ", ".join(f"{name} {n}" for name, n in sorted(churn.done.items())))
    print(f"memory: {sizes[0]:.1f} MiB, at the end {sizes[-1]:.1f}, least {min(sizes):.1f}, most "
          f"{max(sizes):.1f}; {grown:+.2f} % in 10 minutes")  # fmt: skip
    print(f"at rest after the warm-up: {first}\nat rest at the end:        {last}")
    wrong = [f"wrong answer: {text}" for text in churn.wrong]
    if grown > limit:
        wrong.append(f"memory grows by {grown:.2f} % in 10 minutes, over {limit:g} %")
    for name in ("threads", "files"):
        more = getattr(last, name) - getattr(first, name)
        if more > 0:
            wrong.append(f"{more} {name} are left over")
    if last.busy:
        wrong.append(f"{last.busy:g} seats, places in line or slots are still taken")
    return wrong


if __name__ == "__main__":
    typer.run(main)
