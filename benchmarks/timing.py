"""Timing sides against each other on a machine that others use too."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    cpu_seconds: float
    wall_seconds: float


def run_in_turn(
    sides: Mapping[str, Callable[[], None]], rounds: int, console: Console
) -> dict[str, list[Run]]:
    """Every side once a round, in turn, so that a slow spell of the machine meets them all."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            run = measure(side)
            runs[name].append(run)
            console.log(f"round {number + 1}/{rounds} {name}: {run.cpu_seconds:.1f} CPU s")
    return runs


def measure(side: Callable[[], object]) -> Run:
    """One call of a side, on the clock and in CPU time of this process."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    side()
    return Run(_cpu_seconds() - cpu, time.perf_counter() - wall)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rates(runs: Sequence[Run], tokens: int) -> list[float]:
    """Tokens per CPU second of each run."""
    return [tokens / run.cpu_seconds for run in runs]


def spread(values: Sequence[float]) -> str:
    """`median (least–most)`."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of all lies: 0.5 is the median, 1 the greatest."""
    return sorted(values)[round(share * (len(values) - 1))]


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """The ratio of two sides, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def machine() -> str:
    """What a figure was measured on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return f"{len(names)} x {model}, torch {torch.__version__}, {date.today().isoformat()}"
