"""What a generator's tasks answer: held-out tasks from a context alone, with nothing fitted.

Every side answers the same test examples: uniform weights, what the generator makes of a context
without any news (its bias), of the task's own examples, and as the control of another task's. Tasks
that the inventory knows are asked under their own routing as well.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import options, timing
from polyhead.adapters.generator import Generator, piece
from polyhead.adapters.inventory import DTYPES, Inventory
from polyhead.adapters.training.answers import micro_batches
from polyhead.adapters.training.embedding import embed
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE, Encoder
from polyhead.adapters.training.evaluate import EvalOptions, shots_of
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.skills import SharedSkills
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.adapters.training.trainable import Trainable
from polyhead.server.commands.fit import MICRO_TOKENS

SIDES = ("uniform", "bias", "generated", "another's", "own")
Scores = dict[str, tuple[float, float]]
"""Exact match and loss by side."""


class Given:
    """Shared skills under weights that are given: `[T, M, H, S]`."""

    def __init__(self, skills: SharedSkills) -> None:
        self._skills = skills
        self.weights = torch.empty(0)

    def factors(self, tasks: Tensor) -> Factors:
        return self._skills.folded(self.weights[tasks])


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: Annotated[
        Path, typer.Option(help="Folder of an inventory with a generator")
    ] = options.INVENTORY,
    suite: Annotated[Path, typer.Option(help="Folder of the suite")] = Path("data/suite"),
    tasks: Annotated[str, typer.Option(help="Names with commas; empty takes all held out")] = "",
    examples: Annotated[int, typer.Option(help="Examples of a context")] = 16,
    test: Annotated[int, typer.Option(help="Test examples of a task")] = 40,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    bare: Annotated[
        bool, typer.Option(help="Inputs alone in the prompt, not the suite's instructions")
    ] = True,
    seed: Annotated[int, typer.Option(help="Draws the contexts")] = 0,
    threads: Annotated[int, typer.Option(help="Compute threads")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for every score, in JSON")] = None,
) -> None:
    """The generator has to be trained first: `polyhead train --method generator`."""
    console = Console()
    torch.set_num_threads(threads)
    loaded = Inventory.load(inventory)
    if loaded.generator is None:
        raise typer.BadParameter(f"no generator in {inventory}", param_hint="--inventory")
    wanted = [name for name in tasks.split(",") if name]
    chosen = [one for one in read_suite(suite, wanted) if wanted or one.held_out]
    loose: Any = AutoModelForCausalLM
    kind: Any = dtype
    model = loose.from_pretrained(backbone, dtype=DTYPES[kind], local_files_only=True)
    model.eval().requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
    shots = EvalOptions(examples=examples)
    means = [
        embed(model, tokenizer, [piece(e.input, e.output) for e in shots_of(t, shots, seed)]).mean(
            0
        )
        for t in chosen
    ]
    found = _scores(model, tokenizer, loaded, loaded.generator, chosen, means, test, bare)
    report(console, found)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def _scores(
    model: Any,
    tokenizer: Any,
    inventory: Inventory,
    generator: Generator,
    tasks: Sequence[SuiteTask],
    means: Sequence[Tensor],
    test: int,
    bare: bool,
) -> dict[str, Scores]:
    skills = SharedSkills.of(inventory).requires_grad_(False)
    given, header = Given(skills), inventory.header
    trainable = Trainable(model, header.modules, given, header.scaling)
    made = [generator.routing(mean, inventory.layout).values for mean in means]
    uniform = torch.full_like(generator.bias, 1 / header.skills)
    found = {}
    for i, task in enumerate(tasks):
        other = made[(i + len(tasks) // 2) % len(tasks)]
        known = inventory.tasks.get(task.name)
        own = [] if known is None else [known.weights(inventory.layout)]
        given.weights = torch.stack([uniform, generator.bias, made[i], other, *own])
        template = DEFAULT_TEMPLATE if bare else task.template
        sides = SIDES[: len(given.weights)]
        found[task.name] = _score(trainable, Encoder(tokenizer, template), task, test, sides)
    trainable.detach()
    return found


def _score(
    trainable: Trainable, encoder: Encoder, task: SuiteTask, test: int, sides: Sequence[str]
) -> Scores:
    asked = encoder.encode(task.test[:test])
    sums = torch.zeros(2, len(sides))
    half = trainable.model.dtype == torch.bfloat16
    for part in micro_batches(dict.fromkeys(range(len(sides)), asked), MICRO_TOKENS):
        batch = trainable.pack([one for _, one in part], [side for side, _ in part])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            exact, losses = trainable.score(batch)
        owners = torch.tensor(batch.example_task)
        sums.index_add_(1, owners, torch.stack([exact.float(), losses.float()]))
    exact, loss = (sums / len(asked)).tolist()
    return {side: (exact[i], loss[i]) for i, side in enumerate(sides)}


def report(console: Console, found: dict[str, Scores]) -> None:
    """Exact match and loss of every side, and their means over the tasks that have it."""
    rows = [
        [task, *[_shown([scores[s]] if s in scores else []) for s in SIDES]]
        for task, scores in found.items()
    ]
    by_side = {s: [scores[s] for scores in found.values() if s in scores] for s in SIDES}
    rows.append(["mean", *map(_shown, by_side.values())])
    title = f"Exact match, and the loss of the answers\n{timing.machine()}"
    timing.print_table(console, title, ("task", *SIDES), rows)


def _shown(scores: Sequence[tuple[float, float]]) -> str:
    if not scores:
        return "–"
    exact, loss = (statistics.mean(one[k] for one in scores) for k in (0, 1))
    return f"{exact:.3f} ({loss:.2f})"


if __name__ == "__main__":
    typer.run(main)
