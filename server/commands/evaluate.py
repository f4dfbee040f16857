"""`polyhead eval`: the backbone, its prompted self and every method on a suite of tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from polyhead.server.commands.common import AsJson, fail, load_for_fitting, one_line_errors

if TYPE_CHECKING:
    from polyhead.adapters.training.evaluate import EvalOptions
    from polyhead.adapters.training.report import Measured
    from polyhead.adapters.training.suite import SuiteTask

TABLE, PLOT, FIGURES = "scores.md", "scores.png", "scores.json"


def evaluate_command(
    suite: Annotated[Path, typer.Argument(help="Folder with suite.json and the tasks' files")],
    inventory: Annotated[Path, typer.Option(help="Folder of the inventory")],
    backbone: Annotated[str, typer.Option(help="Folder of the backbone, or its name on the hub")],
    out: Annotated[Path, typer.Option(help=f"Folder for {TABLE}, {PLOT} and {FIGURES}")],
    tasks: Annotated[str, typer.Option(help="Names with commas; empty takes all")] = "",
    methods: Annotated[str, typer.Option(help="Fitted on held-out tasks")] = "z,mhr,mu,lora",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0")] = 1,
    examples: Annotated[int, typer.Option(min=1, help="Examples that a task is fitted to")] = 32,
    shots: Annotated[int, typer.Option(min=0, help="Examples in the backbone's prompt")] = 16,
    test: Annotated[
        int | None, typer.Option(min=1, help="Test examples a task; all without it")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a fit at most")] = None,
    device: Annotated[str, typer.Option(help="A torch device, or auto")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure exact match, token F1 and rank classification; answers come from the engine.

    Held-out tasks are fitted by every method; training tasks are answered by the routings that
    the inventory brings along.
    """
    with one_line_errors():
        from polyhead.adapters.training.suite import read_suite

        chosen = read_suite(suite, _names(tasks))
        options = _options(methods, seeds, examples, shots, test, steps)
        measured = _measure(chosen, inventory, backbone, device, options)
        _write(measured, options, out, f"{inventory} on {Path(backbone).name}")
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in measured], indent=2))
    else:
        typer.echo((out / TABLE).read_text())


def _options(
    methods: str, seeds: int, examples: int, shots: int, test: int | None, steps: int | None
) -> "EvalOptions":
    from polyhead.adapters.training.evaluate import EvalOptions
    from polyhead.adapters.training.fewshot_types import FitOptions, TrainedMethod

    names: Any = tuple(_names(methods))
    odd = sorted(set(names) - set(get_args(TrainedMethod)))
    if odd:
        fail(f"--methods: expected among {', '.join(get_args(TrainedMethod))}, found {odd}", 2)
    fitting = FitOptions() if steps is None else FitOptions(steps=steps)
    return EvalOptions(tuple(range(seeds)), examples, shots, names, test, fitting)


def _measure(
    tasks: Sequence["SuiteTask"],
    inventory: Path,
    backbone: str,
    device: str,
    options: "EvalOptions",
) -> list["Measured"]:
    from polyhead.adapters.inventory import Inventory
    from polyhead.adapters.training.evaluate import fit_suite, measure, systems
    from polyhead.server.commands.answering import EngineAnswerer
    from polyhead.server.commands.progress import FitBars, bar

    loaded = Inventory.load(inventory)
    model, tokenizer = load_for_fitting(backbone, device)
    with FitBars() as bars:
        fitted = fit_suite(model, loaded, tokenizer, tasks, options, bars.report)
    del model
    found: list[Measured] = []
    answerer = EngineAnswerer.load(backbone, inventory, device)
    try:
        every = list(systems(loaded, tokenizer, tasks, fitted, options))
        for system in bar(every, lambda one: f"{one.task.name}: {one.name}"):
            found += measure(answerer, tokenizer, system, options)
    finally:
        answerer.close()
    return found


def _write(measured: Sequence["Measured"], options: "EvalOptions", out: Path, title: str) -> None:
    from polyhead.adapters.training.report import document, plot

    out.mkdir(parents=True, exist_ok=True)
    facts = [f"{options.examples} examples a fit, seeds {', '.join(map(str, options.seeds))}."]
    (out / TABLE).write_text(document(measured, title, facts))
    figures = [one.as_dict() for one in measured]
    (out / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    plot(measured, out / PLOT)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
