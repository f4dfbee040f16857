"""What a server does under ten times the load that it can take, and how soon it is over that.

    python -m benchmarks overload --rate 1.5

One plan of arrivals: at `--rate`, which the server should be able to do, then at `--times` as much,
then at `--rate` again. Goodput is as in `load`. Recovery is how long after the overload
the last request was sent that was refused or missed a target.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.load import register
from benchmarks.load_client import Answered, Planned, plan, send
from benchmarks.serving import serving
from benchmarks.simulated import Load

FIGURES = ("phase", "sent", "goodput/s", "refused", "with Retry-After", "refusal ms p50", "p99")
NAME = "load-%d"


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    rate: Annotated[float, typer.Option(help="Requests a second that can be done")] = 1.5,
    times: Annotated[float, typer.Option(help="What is sent of that in the overload")] = 10.0,
    seconds: Annotated[float, typer.Option(help="Of each of the three phases")] = 60.0,
    tasks: Annotated[int, typer.Option(help="Tasks that requests are spread over")] = 200,
    first_token: Annotated[float, typer.Option(help="Target in seconds")] = 5.0,
    gap: Annotated[float, typer.Option(help="Target of the mean gap in seconds")] = 1.0,
    max_wait: Annotated[float, typer.Option(help="--max-wait-seconds of the server")] = 3.0,
    seats: Annotated[int, typer.Option(help="--max-running of the server")] = 64,
    client_core: Annotated[int | None, typer.Option(help="Core of this client alone")] = None,
    out: Annotated[Path, typer.Option(help="File of the figures")] = Path("data/overload.json"),
) -> None:
    planned = _phases(rate, times, seconds, tasks)
    flags = ("--threads", "1", "--max-wait-seconds", f"{max_wait:g}", "--log-level", "warning")
    flags += ("--max-running", str(seats))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder), *flags) as served,
    ):
        register(served, NAME, tasks)
        if client_core is not None:
            os.sched_setaffinity(0, {client_core})
        names = [NAME % number for number in range(tasks)]
        everything = [request for phase in planned for request in phase]
        answered = send(f"http://127.0.0.1:{served.port}", names, everything)
    targets = (first_token, gap)
    rows, start = [], 0
    for name, phase in zip(("before", "overload", "after"), planned, strict=True):
        own = answered[start : start + len(phase)]
        rows.append({"phase": name, **_figures(own, seconds, targets)})
        start += len(phase)
    recovery = _recovery(planned[-1], answered[-len(planned[-1]) :], 2 * seconds, targets)
    title = f"{rate:g}/s, then {times:g} times that; {timing.machine()}"
    cells = [[_shown(row[name]) for name in FIGURES] for row in rows]
    timing.print_table(Console(width=120), title, FIGURES, cells)
    print(f"recovered after {recovery:.1f} s")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"phases": rows, "recovery": recovery}, indent=2) + "\n")


def _phases(rate: float, times: float, seconds: float, tasks: int) -> list[list[Planned]]:
    """Arrivals of each phase, the next one's after the last one's."""
    rates = (rate, rate * times, rate)
    return [
        [
            replace(request, at=request.at + number * seconds)
            for request in plan(Load(each, tasks, 1.0, 1.0), seconds, seed=number)
        ]
        for number, each in enumerate(rates)
    ]


def _figures(
    answered: Sequence[Answered], seconds: float, targets: tuple[float, float]
) -> dict[str, float]:
    refused = [one for one in answered if one.status in (429, 503)]
    times = [1e3 * one.headers for one in refused] or [float("nan")]
    values = (
        len(answered),
        sum(one.good(*targets) for one in answered) / seconds,
        len(refused),
        sum(one.retry_after for one in refused),
        timing.quantile(times, 0.5),
        timing.quantile(times, 0.99),
    )
    return dict(zip(FIGURES[1:], values, strict=True))


def _recovery(
    planned: Sequence[Planned],
    answered: Sequence[Answered],
    over: float,
    targets: tuple[float, float],
) -> float:
    """Seconds from the end of the overload to the last request after it that went wrong."""
    pairs = zip(planned, answered, strict=True)
    return max((sent.at - over for sent, one in pairs if not one.good(*targets)), default=0.0)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
