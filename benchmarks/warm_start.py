"""What a warm start saves: steps to the score of a cold one, on held-out tasks.

Every side learns the same examples in the same order, from its own start: cold from uniform
weights, warm from the known task that `starts` finds near, and as the control from a known task
drawn by chance. Scores are of test examples that nobody learns from.
"""

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import options, timing
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.answers import Encoded, micro_batches
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE, Encoder
from polyhead.adapters.training.evaluate import EvalOptions, shots_of
from polyhead.adapters.training.fewshot_adam import Owned, OwnersAdam
from polyhead.adapters.training.fewshot_joint import LAST_RATE
from polyhead.adapters.training.fewshot_runs import Learner
from polyhead.adapters.training.fewshot_types import FitOptions
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import RoutedSource
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.adapters.training.trainable import Trainable
from polyhead.adapters.training.warm_start import logits_of, starts
from polyhead.server.commands.common import load_for_fitting
from polyhead.server.commands.fit import MICRO_TOKENS

SIDES = ("cold", "warm", "random")
STEPS = (0, 1, 2, 3, 5, 8, 12, 16)
"""When the test examples are scored; the last is the end. Rates fall as in a fit of the default
length, which would go on."""
GOAL = 2.0


@dataclass(frozen=True)
class Curve:
    """Exact match and loss of one side of one task, at each of `STEPS`."""

    task: str
    side: str
    began_from: str
    exact: list[float]
    losses: list[float]


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    suite: Annotated[Path, typer.Option(help="Folder of the suite")] = Path("data/suite"),
    tasks: Annotated[str, typer.Option(help="Names with commas; empty takes all held out")] = "",
    test: Annotated[int, typer.Option(help="Test examples of a task")] = 24,
    together: Annotated[int, typer.Option(help="Tasks that learn in one batch")] = 5,
    bare: Annotated[
        bool, typer.Option(help="Inputs alone in the prompt, as the demo's inventory was trained")
    ] = True,
    control: Annotated[bool, typer.Option(help="A random known task's start as well")] = True,
    seed: Annotated[int, typer.Option(help="Draws examples, their order and random starts")] = 0,
    threads: Annotated[int, typer.Option(help="Compute threads")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for every curve, in JSON")] = None,
) -> None:
    """The tasks that are fitted are never among those begun from."""
    console = Console()
    torch.set_num_threads(threads)
    wanted = [name for name in tasks.split(",") if name]
    chosen = [one for one in read_suite(suite, wanted) if one.held_out]
    bench = Bench(backbone, Inventory.load(inventory), suite, test, seed, control, bare)
    curves: list[Curve] = []
    for first in range(0, len(chosen), together):
        curves += bench.run(chosen[first : first + together])
        console.log(f"{min(first + together, len(chosen))} of {len(chosen)} tasks")
        if out is not None:
            out.write_text(json.dumps([vars(curve) for curve in curves], indent=1) + "\n")
    report(console, curves)
    console.print(f"{bench.searched:.1f} CPU s searching, {bench.stepped:.1f} for the steps")


class Bench:
    """The backbone, loaded once, and what it spent its time on."""

    def __init__(
        self,
        backbone: Path,
        inventory: Inventory,
        suite: Path,
        test: int,
        seed: int,
        control: bool,
        bare: bool,
    ) -> None:
        self._model, self._tokenizer = load_for_fitting(str(backbone), "cpu")
        self._inventory = inventory
        unseen = {one.name for one in read_suite(suite) if one.held_out}
        self._known = {n: one for n, one in inventory.tasks.items() if n not in unseen}
        self._skills = SharedSkills.of(inventory).requires_grad_(False)
        self._test, self._seed, self._bare = test, seed, bare
        self._sides = SIDES if control else SIDES[:2]
        self.searched = self.stepped = 0.0

    def run(self, tasks: Sequence[SuiteTask]) -> list[Curve]:
        """The curves of every side of some tasks, which learn in one batch."""
        pairs = [(task, side) for task in tasks for side in self._sides]
        chosen = FitOptions(method="z", seed=self._seed)
        learners, asked = [], []
        for task, _ in pairs:
            template = DEFAULT_TEMPLATE if self._bare else task.template
            encoder = Encoder(self._tokenizer, template)
            shots = shots_of(task, EvalOptions(), self._seed)
            learners.append(Learner(tuple(encoder.encode(shots)), (), chosen))
            asked.append(encoder.encode(task.test[: self._test]))
        routings = Routings(self._inventory.layout, len(pairs))
        source = RoutedSource(self._skills, routings)
        header = self._inventory.header
        trainable = Trainable(self._model, header.modules, source, header.scaling)
        names = self._begin(trainable, routings, pairs, learners)
        scores = self._learn(trainable, routings, learners, asked, chosen)
        trainable.detach()
        return [
            Curve(task.name, side, names[i], *[[at[k][i] for at in scores] for k in (0, 1)])
            for i, (task, side) in enumerate(pairs)
        ]

    def _begin(
        self,
        trainable: Trainable,
        routings: Routings,
        pairs: Sequence[tuple[SuiteTask, str]],
        learners: Sequence[Learner],
    ) -> list[str]:
        """Put every side where it begins; whose routing that is, by pair."""
        names = [""] * len(pairs)
        warm = [i for i, (_, side) in enumerate(pairs) if side == "warm"]
        layout = self._inventory.layout

        def search() -> None:
            found = starts(
                trainable,
                self._skills,
                [learners[i] for i in warm],
                self._known,
                layout,
                micro_tokens=MICRO_TOKENS,
            )
            for i, start in zip(warm, found, strict=True):
                if start is not None:
                    names[i] = " + ".join(start.tasks)
                    routings.logits.data[i] = start.logits

        self.searched += timing.measure(search).cpu_seconds
        for i, (task, side) in enumerate(pairs):
            if side == "random":
                names[i] = random.Random(f"{self._seed}/{task.name}").choice(list(self._known))
                drawn: Routing = self._known[names[i]]
                routings.logits.data[i] = logits_of(drawn.weights(layout))
        return names

    def _learn(
        self,
        trainable: Trainable,
        routings: Routings,
        learners: Sequence[Learner],
        asked: Sequence[Sequence[Encoded]],
        chosen: FitOptions,
    ) -> list[tuple[list[float], list[float]]]:
        adam = OwnersAdam([Owned("logits", routings.logits, 0)])
        scores = []
        for step in range(STEPS[-1] + 1):
            if step in STEPS:
                scores.append(self._score(trainable, asked))
            if step == STEPS[-1]:
                break
            rate = chosen.logits_rate * (1 - (1 - LAST_RATE) * step / chosen.steps)
            work = {i: learner.draw(step) for i, learner in enumerate(learners)}
            rates = torch.full((len(learners),), rate)

            def take(work: Mapping[int, Sequence[Encoded]] = work, step: int = step) -> None:
                for part in micro_batches(work, MICRO_TOKENS):
                    batch = trainable.pack([one for _, one in part], [i for i, _ in part])
                    (trainable(batch).sum() / chosen.batch_examples).backward()
                adam.step(step + 1, [rates])  # noqa: B023, called before the loop goes on

            self.stepped += timing.measure(take).cpu_seconds
        return scores

    def _score(
        self, trainable: Trainable, asked: Sequence[Sequence[Encoded]]
    ) -> tuple[list[float], list[float]]:
        """Exact match and mean loss of every learner on its test examples."""
        sums = torch.zeros(2, len(asked))
        for part in micro_batches(dict(enumerate(asked)), MICRO_TOKENS):
            batch = trainable.pack([one for _, one in part], [i for i, _ in part])
            exact, losses = trainable.score(batch)
            owners = torch.tensor(batch.example_task)
            sums.index_add_(1, owners, torch.stack([exact.float(), losses.float()]))
        found: Tensor = sums / torch.tensor([len(one) for one in asked])
        return found[0].tolist(), found[1].tolist()


def report(console: Console, curves: Sequence[Curve]) -> None:
    """Steps of every side to the best score that the cold one came to."""
    by_side = {(curve.task, curve.side): curve for curve in curves}
    sides = [side for side in SIDES if any(curve.side == side for curve in curves)]
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    ratios: dict[str, list[float]] = {side: [] for side in sides[1:]}
    rows = []
    for task in tasks:
        cold = by_side[task, "cold"]
        target = max(cold.exact)
        if target == 0:
            rows.append([task, "0.00", "–", *["–" for _ in sides[1:]], "learned by no routing"])
            continue
        took = {side: first_step(by_side[task, side].exact, target) for side in sides}
        for side in sides[1:]:
            ratios[side].append(ratio(took["cold"], took[side]))
        others = [shown(took[side]) for side in sides[1:]]
        near = by_side[task, "warm"].began_from or "uniform weights"
        rows.append([task, f"{target:.2f}", shown(took["cold"]), *others, near])
    title = f"Steps to the cold start's best exact match; goal: median {GOAL} times fewer"
    columns = ("task", "score", *sides, "warm from")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)
    for side, found in ratios.items():
        if found:
            least, most = min(found), max(found)
            text = f"cold over {side}: median {statistics.median(found):.2f}"
            console.print(f"{text} ({least:.2f} to {most:.2f}) over {len(found)} tasks")
    for side in sides:
        own = [by_side[task, side] for task in tasks]
        means = [statistics.mean(one.exact[k] for one in own) for k in range(len(STEPS))]
        told = ", ".join(f"{s}: {m:.2f}" for s, m in zip(STEPS, means, strict=True))
        console.print(f"{side}, mean exact match by step: {told}")


def first_step(exact: Sequence[float], target: float) -> int | None:
    """The first scored step with at least this score."""
    found = (step for step, value in zip(STEPS, exact, strict=True) if value >= target)
    return next(found, None)


def ratio(cold: int | None, other: int | None) -> float:
    """How many times fewer steps; one that begins there counts as one step, and one that never
    came there as one that came a step after the end."""
    most = STEPS[-1] + 1
    return max(1, most if cold is None else cold) / max(1, most if other is None else other)


def shown(step: int | None) -> str:
    return f"> {STEPS[-1]}" if step is None else str(step)


if __name__ == "__main__":
    typer.run(main)
