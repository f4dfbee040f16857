"""How many replicas a load needs by its number of tasks, for Polyhead and for slots of LoRAs.

A discrete-event simulation of whole clusters. Its step times are measured on this machine first (or
read from `--times`, a JSON file of what an earlier run measured, for instance on a GPU). Servers
of one LoRA per task get the step times of Polyhead's bare backbone and requests placed by the
same rules, so that what they are short of is slots alone; only the "slower" ones' steps take longer
in mixed batches, too. Where LoRAs are kept, and what that takes, is left out.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks import options, timing
from benchmarks.simulated import Load, Server, StepTimes, replicas_needed
from polyhead.adapters.training import canvas

SLOTS = (8, 64)
LOAD_SECONDS = 0.016
"""A LoRA's way into a slot, the median that vLLM takes on a CPU."""
MIXED = 1.5
"""What a batch of many LoRAs takes, over a bare one, by the reports of vLLM's users on GPUs."""
SEATS = 64
MOST = 512
STEADY_STEPS = 2000
"""Steps of a simulated run: a request is in the batch for about 50 of them."""


def main(
    backbone: options.Backbone = options.BACKBONE,
    times: Annotated[Path | None, typer.Option(help="Step times measured before")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the picture and the figures")] = Path(
        "data/simulated"
    ),
    busy: Annotated[float, typer.Option(help="Load, in bare replicas that it keeps busy")] = 4.0,
    tasks: Annotated[list[int], typer.Option(help="Numbers of tasks")] = [  # noqa: B006
        10**n for n in range(2, 7)
    ],
    alpha: Annotated[float, typer.Option(help="Exponent of the tasks' popularity")] = 1.0,
    cv: Annotated[float, typer.Option(help="Of the pauses between arrivals")] = 4.0,
    patience: Annotated[float, typer.Option(help="Steps of a full batch to the first token")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Of measuring the step times")] = 3,
) -> None:
    console = Console(width=110)
    measured = _times(backbone, times, rounds, console)
    servers = _servers(measured)
    full = StepTimes(**measured["bare"])
    rate = busy / (full.of(SEATS, 0) * 48 / SEATS + 80 * full.prompt_token)  # as `Load` draws
    target = patience * full.of(SEATS, 0)
    seconds = STEADY_STEPS * full.of(SEATS, 0)
    needed: dict[str, list[int | None]] = {server.name: [] for server in servers}
    for count in track(tasks, "simulating", console=console):
        load = Load(rate, count, alpha, cv)
        for server in servers:
            needed[server.name].append(replicas_needed(server, load, target, seconds, most=MOST))
    _print(console, tasks, needed, rate, target)
    out.mkdir(parents=True, exist_ok=True)
    told = {"times": measured, "rate": rate, "target": target, "tasks": tasks, "replicas": needed}
    (out / "simulated.json").write_text(json.dumps(told, indent=2) + "\n")
    _draw(out / "replicas.png", tasks, needed)


def _times(
    backbone: Path, given: Path | None, rounds: int, console: Console
) -> dict[str, dict[str, Any]]:
    if given is not None:
        found: dict[str, Any] = json.loads(given.read_text())
        return dict(found.get("times", found))
    from benchmarks.calibration import measure_step_times

    return {
        name: measure_step_times(backbone, routed=routed, rounds=rounds, console=console)
        for name, routed in (("bare", False), ("routed", True))
    }


def _servers(measured: dict[str, dict[str, Any]]) -> list[Server]:
    bare, routed = (StepTimes(**measured[name]) for name in ("bare", "routed"))
    mixed = StepTimes(*(MIXED * seconds for seconds in asdict(bare).values()))
    kinds = [(f"{n} slots of LoRAs", bare, n) for n in SLOTS]
    kinds += [(f"{SLOTS[-1]} slots, slower", mixed, SLOTS[-1])]
    return [
        Server("Polyhead", routed, SEATS),
        *(Server(name, t, SEATS, slots=n, load_seconds=LOAD_SECONDS) for name, t, n in kinds),
    ]


def _print(
    console: Console,
    tasks: list[int],
    needed: dict[str, list[int | None]],
    rate: float,
    target: float,
) -> None:
    rows = [
        (f"{count:,}", *(str(found[place] or f"> {MOST}") for found in needed.values()))
        for place, count in enumerate(tasks)
    ]
    title = f"Replicas for {rate:.3g} requests/s, 99 % with a first token within {target:.3g} s\n"
    columns = ("tasks", *needed)
    timing.print_table(console, f"{title}{timing.machine()}", columns, rows)


def _draw(path: Path, tasks: list[int], needed: dict[str, list[int | None]]) -> None:
    figure, (axes,) = canvas.figure(1, 7.0, 4.0)
    for name, found in needed.items():
        points = [(count, least) for count, least in zip(tasks, found, strict=True) if least]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel="tasks", ylabel="replicas needed")
    axes.set_ylim(bottom=0)
    axes.set_title("The same load, spread over more and more tasks")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.save(figure, path)


if __name__ == "__main__":
    typer.run(main)
