"""How long fitting takes: one task alone, and sixteen together over sixteen times one."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.evaluate import EvalOptions, shots_of
from polyhead.adapters.training.fewshot import FitOptions, FitTask, fit
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.server.commands.common import load_for_fitting
from polyhead.server.commands.fit import MICRO_TOKENS

TOGETHER = 16
EXAMPLES = 32
GOAL_SECONDS, GOAL_RATIO = 60.0, 0.6


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    suite: Annotated[Path, typer.Option(help="Folder of the suite")] = Path("data/suite"),
    method: Annotated[str, typer.Option(help="How the tasks are fitted")] = "z",
    steps: Annotated[int, typer.Option(help="Steps of each fit; none stops early")] = 60,
    alone: Annotated[int, typer.Option(help="How many of the sixteen are fitted alone too")] = 4,
    threads: Annotated[int, typer.Option(help="Compute threads")] = 2,
    dtype: Annotated[str, typer.Option(help="As of `polyhead fit`")] = "auto",
) -> None:
    """Held-out tasks first, 32 examples each; loading is not counted."""
    console = Console()
    torch.set_num_threads(threads)
    model, tokenizer = load_for_fitting(str(backbone), "cpu", dtype)
    loaded = Inventory.load(inventory)
    # Nothing may end early, or the two sides would do different work.
    chosen = FitOptions(method=method, steps=steps, patience=steps)  # type: ignore[arg-type]
    tasks = [_fit_task(task, chosen) for task in _sixteen(read_suite(suite))]
    singles = _middle(tasks, tokenizer, alone)

    def run(together: Sequence[FitTask]) -> timing.Run:
        return timing.measure(
            lambda: fit(model, loaded, tokenizer, together, micro_tokens=MICRO_TOKENS)
        )

    run([_fit_task(_sixteen(read_suite(suite))[0], FitOptions(method="z", steps=1))])
    runs = []
    for task in singles:
        runs.append(run([task]))
        console.log(f"{task.name} alone: {_told(runs[-1])}")
    together = run(tasks)
    console.log(f"{len(tasks)} tasks together: {_told(together)}")
    _print(console, runs, together, len(tasks), method)


def _print(
    console: Console, runs: Sequence[timing.Run], together: timing.Run, count: int, method: str
) -> None:
    rows = []
    for clock in ("wall_seconds", "cpu_seconds"):
        one = [getattr(run, clock) for run in runs]
        both = getattr(together, clock)
        ratio = both / (count * statistics.mean(one))
        rows.append((clock, timing.spread(one), f"{both:.1f}", f"{ratio:.2f}"))
    title = f"Fitting by {method}; goals: {GOAL_SECONDS:.0f} s for one, ratio {GOAL_RATIO}"
    columns = ("", "one task", f"{count} together", f"over {count} times one")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)


def _told(run: timing.Run) -> str:
    return f"{run.wall_seconds:.1f} s, {run.cpu_seconds:.1f} CPU s"


def _sixteen(tasks: Sequence[SuiteTask]) -> list[SuiteTask]:
    """Held-out tasks, and training tasks where there are too few of them."""
    return sorted(tasks, key=lambda task: not task.held_out)[:TOGETHER]


def _fit_task(task: SuiteTask, options: FitOptions) -> FitTask:
    examples = shots_of(task, EvalOptions(examples=EXAMPLES), options.seed)
    return FitTask(task.name, tuple(examples), task.template, options)


def _middle(tasks: Sequence[FitTask], tokenizer: Any, count: int) -> list[FitTask]:
    """Tasks of middling length, so that a few of them stand for the mean of all."""
    sizes = {
        t.name: sum(map(len, Encoder(tokenizer, t.template).encode(t.examples))) for t in tasks
    }
    mean = statistics.mean(sizes.values())
    return sorted(tasks, key=lambda task: abs(sizes[task.name] - mean))[:count]


if __name__ == "__main__":
    typer.run(main)
