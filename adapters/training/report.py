"""What an evaluation found, as a Markdown table and as a plot."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Metric = Literal["exact", "f1", "rank"]
METRICS: dict[Metric, str] = {
    "exact": "Exact match",
    "f1": "Token F1",
    "rank": "Rank classification",
}
AVERAGE = "average"


@dataclass(frozen=True)
class Measured:
    """One score of one system on one task under one seed, in [0, 1]."""

    task: str
    held_out: bool
    system: str
    metric: Metric
    seed: int
    value: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> str:
    """`median (least–most)` in per cent; the median alone where the seeds agree."""
    middle, least, most = (
        f"{100 * value:.1f}" for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == most else f"{middle} ({least}–{most})"


def averages(measured: Iterable[Measured]) -> list[float]:
    """The mean over tasks for each seed, in the order of the seeds.

    Over tasks first: the spread is then that of a whole run, not of tasks among themselves.
    """
    by_seed: dict[int, list[float]] = {}
    for one in measured:
        by_seed.setdefault(one.seed, []).append(one.value)
    return [statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)]


def table(measured: Sequence[Measured]) -> str:
    """A Markdown table of measurements of one metric: a row for each task, a column a system."""
    systems = _ordered(one.system for one in measured)
    names = _ordered(one.task for one in measured)
    rows = [[name, *(_cell(measured, s, name) for s in systems)] for name in names]
    overall = [f"**{AVERAGE}**", *(_average(measured, s, names) for s in systems)]
    lines = [["task", *systems], ["---"] * (len(systems) + 1), *rows, overall]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def document(measured: Sequence[Measured], title: str, facts: Sequence[str] = ()) -> str:
    """The whole report: for each metric a table of the training tasks and one of the held-out."""
    parts = [f"# {title}", *facts, "Per cent; `median (least–most)` over seeds."]
    for held_out, heading in ((False, "Training tasks"), (True, "Held-out tasks")):
        for metric, name in METRICS.items():
            chosen = [m for m in measured if m.held_out == held_out and m.metric == metric]
            if chosen:
                parts += [f"## {heading}: {name.lower()}", table(chosen).rstrip()]
    return "\n\n".join(parts) + "\n"


def plot(measured: Sequence[Measured], path: Path) -> None:
    """Draw averages as bars with the spread over seeds, every task a dot; writes a PNG."""
    from polyhead.adapters.training.canvas import figure, save

    panels = [
        (metric, held_out, [m for m in measured if m.metric == metric and m.held_out == held_out])
        for metric in METRICS
        for held_out in (False, True)
    ]
    panels = [panel for panel in panels if panel[2]]
    canvas, axes = figure(len(panels), width=6.5, height=3.2)
    for axis, (metric, held_out, chosen) in zip(axes, panels, strict=True):
        _bars(axis, chosen)
        axis.set_title(f"{METRICS[metric]}, {'held-out' if held_out else 'training'} tasks")
    save(canvas, path)


def _bars(axis: Any, measured: Sequence[Measured]) -> None:
    systems = _ordered(one.system for one in measured)
    for place, system in enumerate(systems):
        own = [one for one in measured if one.system == system]
        runs = averages(own)
        middle = statistics.median(runs)
        error = [[100 * (middle - min(runs))], [100 * (max(runs) - middle)]]
        axis.barh(place, 100 * middle, xerr=error, color="#9ec5e8", ecolor="#1f4e79", capsize=3)
        dots = [statistics.median(_of(own, name)) for name in _ordered(one.task for one in own)]
        axis.plot([100 * dot for dot in dots], [place] * len(dots), "o", ms=3, color="#555555")
    axis.set_yticks(range(len(systems)), systems)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("per cent")


def _cell(measured: Sequence[Measured], system: str, name: str) -> str:
    values = [m.value for m in measured if m.system == system and m.task == name]
    return spread(values) if values else "–"


def _average(measured: Sequence[Measured], system: str, names: Sequence[str]) -> str:
    own = [one for one in measured if one.system == system]
    covered = len({one.task for one in own})
    note = "" if covered == len(names) else f" over {covered} of {len(names)}"
    return f"**{spread(averages(own))}**{note}"


def _of(measured: Sequence[Measured], name: str) -> list[float]:
    return [one.value for one in measured if one.task == name]


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
