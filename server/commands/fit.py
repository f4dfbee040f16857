"""`polyhead fit`: few examples in, a routing or a private adapter out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyhead.server.commands.common import AsJson, fail, load_for_fitting, one_line_errors
from polyhead.server.commands.served_tasks import unescaped

if TYPE_CHECKING:
    from polyhead.adapters.inventory import Inventory
    from polyhead.adapters.training.fewshot import FitResult, FitTask

SUFFIX = ".safetensors"
MICRO_TOKENS = 1024
"""Of one forward pass: nobody waits for a pause, and larger ones are a tenth faster."""


def fit_command(
    examples: Annotated[
        Path, typer.Option(help="JSONL with task, input and output; task may be left to --task")
    ],
    inventory: Annotated[Path, typer.Option(help="Folder of the inventory")],
    backbone: Annotated[str, typer.Option(help="Folder of the backbone, or its name on the hub")],
    task: Annotated[
        str | None, typer.Option(help="Only this task; without it, every task of the file at once")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, or folder where there are several tasks")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="A server's data folder to register the tasks in")
    ] = None,
    method: Annotated[str | None, typer.Option(help="auto, z, mhr, mu or lora")] = None,
    template: Annotated[str | None, typer.Option(help="Holds {input}, escapes as in JSON")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps at most")] = None,
    batch_examples: Annotated[int | None, typer.Option(help="Examples of a step")] = None,
    logits_rate: Annotated[float | None, typer.Option(help="Learning rate of a routing")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of adapters")] = None,
    patience: Annotated[int | None, typer.Option(help="Scorings without improvement")] = None,
    holdout: Annotated[float | None, typer.Option(help="Part of the examples to score on")] = None,
    folds: Annotated[int | None, typer.Option(help="Score every example in so many turns")] = None,
    warm_start: Annotated[
        bool | None, typer.Option("--warm-start", help="Begin from the nearest tasks' routings")
    ] = None,
    prompted: Annotated[
        bool | None, typer.Option("--prompted", help="Score the prompted backbone too")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn")] = None,
    device: Annotated[str, typer.Option(help="A torch device, or auto")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Numbers of the frozen backbone; auto is bfloat16 on a CPU that has it"),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit tasks to a few examples each, all of them in one batch."""
    if out is None and data_dir is None:
        fail("--out or --data-dir is needed: where is the result to go?", 2)
    given = {
        "method": method,
        "steps": steps,
        "batch_examples": batch_examples,
        "logits_rate": logits_rate,
        "rate": rate,
        "patience": patience,
        "holdout": holdout,
        "folds": folds,
        "warm_start": warm_start,
        "prompted": prompted,
        "seed": seed,
    }
    with one_line_errors():
        options = {name: value for name, value in given.items() if value is not None}
        tasks = _read_tasks(examples, task, template, options)
        loaded, results = _fit(tasks, inventory, backbone, device, dtype)
        if out is not None:
            _write(results, out, several=len(tasks) > 1)
        if data_dir is not None:
            _register(results, {one.name: one for one in tasks}, loaded, data_dir)
    _print(results, as_json)
    lost = sorted({one.name for one in tasks} - {one.task for one in results})
    if lost:
        fail(f"the numbers of {', '.join(lost)} overflowed: try a lower --rate", 1)


def _read_tasks(
    path: Path, name: str | None, template: str | None, options: dict[str, Any]
) -> list["FitTask"]:
    from polyhead.adapters.training.data import by_task, read_examples
    from polyhead.adapters.training.encode import DEFAULT_TEMPLATE
    from polyhead.adapters.training.errors import ConfigError
    from polyhead.adapters.training.fewshot import FitOptions, FitTask

    try:
        chosen = FitOptions(**options)
    except ConfigError as exc:
        fail(f"--{exc.field.replace('_', '-')}{str(exc).removeprefix(exc.field)}", 2)
    form = DEFAULT_TEMPLATE if template is None else unescaped(template)
    found = by_task(read_examples(path, name))
    if name is not None:
        found = {own: examples for own, examples in found.items() if own == name}
        if not found:
            fail(f"{path}: no examples of the task {name!r}", 1)
    return [FitTask(own, tuple(examples), form, chosen) for own, examples in found.items()]


def _fit(
    tasks: Sequence["FitTask"], inventory: Path, backbone: str, device: str, dtype: str
) -> tuple["Inventory", list["FitResult"]]:
    from polyhead.adapters.inventory import Inventory
    from polyhead.adapters.training.fewshot import fit
    from polyhead.server.commands.progress import FitBars

    loaded = Inventory.load(inventory)
    model, tokenizer = load_for_fitting(backbone, device, dtype)
    with FitBars() as bars:
        results = fit(
            model, loaded, tokenizer, tasks, report=bars.report, micro_tokens=MICRO_TOKENS
        )
        return loaded, results


def _write(results: Sequence["FitResult"], out: Path, *, several: bool) -> None:
    for result in results:
        path = out / f"{result.task}{SUFFIX}" if several or out.is_dir() else out
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter = result.routing or result.private
        assert adapter is not None
        path.write_bytes(adapter.to_safetensors())


def _register(
    results: Sequence["FitResult"],
    tasks: dict[str, "FitTask"],
    inventory: "Inventory",
    data_dir: Path,
) -> None:
    """New tasks, or new generations of tasks that are there."""
    from polyhead.server.tasks.errors import UnknownTask
    from polyhead.server.tasks.registry import Registry

    registry = Registry(data_dir, inventory.fingerprint, inventory.layout)
    try:
        for result in results:
            adapter = result.routing or result.private
            assert adapter is not None
            form = tasks[result.task].template
            how = {"how": "fitted", "method": result.method}
            try:
                found = registry.get(result.task).generation
            except UnknownTask:
                registry.create(result.task, adapter, template=form, provenance=how)
            else:
                registry.refit(result.task, adapter, template=form, provenance=how, if_match=found)
    finally:
        registry.close()


def _print(results: Sequence["FitResult"], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_facts(result) for result in results], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "method", "tried", "score", "seconds", box=None)
    for result in results:
        for one in result.methods:
            kept = one.method if one.method == result.method else ""
            score = "–" if one.score is None else f"{one.score:.2f}"
            table.add_row(result.task, kept, one.method, score, f"{one.seconds:.1f}")
    Console().print(table)


def _facts(result: "FitResult") -> dict[str, Any]:
    return {
        "task": result.task,
        "method": result.method,
        "kind": "routing" if result.routing is not None else "private_adapter",
        "score": result.score,
        "prompted_score": result.prompted_score,
        "methods": [asdict(one) for one in result.methods],
        "seconds": result.seconds,
        "began_from": list(result.began_from),
    }
