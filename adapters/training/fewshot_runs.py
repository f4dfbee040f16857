"""Who learns in a joint fit, from which examples, and how far each task is.

A task with held-out examples has one learner for each split, and one that learns from all of its
examples. They take the same steps side by side; the splits' scores tell at which step the last
one is to be kept.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.fewshot_history import History
from polyhead.adapters.training.fewshot_methods import Snapshot
from polyhead.adapters.training.fewshot_types import FitOptions
from polyhead.adapters.training.holdout import Split

SCORINGS = 6
"""How often held-out examples are scored on the way."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task that is ready to be fitted: its tokens and which of them are held out when."""

    name: str
    encoded: tuple[Encoded, ...]
    splits: tuple[Split, ...]
    options: FitOptions


@dataclass(frozen=True, eq=False)
class Learner:
    """One set of parameters: what it learns from and what it is scored on."""

    examples: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    options: FitOptions

    def draw(self, step: int) -> list[Encoded]:
        """The examples of a step (from 0): every example once before any comes again.

        A function of seed and step alone, so that a resumed fit goes on as it would have.
        """
        count = len(self.examples)
        size = min(self.options.batch_examples, count)
        places = range(step * size, (step + 1) * size)
        orders = {place // count: self._order(place // count) for place in places}
        return [self.examples[orders[place // count][place % count]] for place in places]

    def first(self, count: int) -> list[Encoded]:
        """The examples that it learns from first, at most so many."""
        return [self.examples[i] for i in self._order(0)[:count]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.examples)))
        random.Random(f"{self.options.seed}/{epoch}").shuffle(order)
        return order


@dataclass
class TaskRun:
    """One task's way through the fit. `keeper` is the learner whose parameters it will have.

    A task that finished without a best state has diverged.
    """

    name: str
    options: FitOptions
    scored: list[int]
    keeper: int
    history: History = field(default_factory=History)
    best: Snapshot | None = None
    loss: float = float("nan")
    seconds: float = 0.0
    began_from: tuple[str, ...] = ()  # known tasks
    finished: bool = False
    cancelled: bool = False

    def is_due(self, step: int) -> bool:
        """Whether held-out examples are to be scored after this many steps and were not yet."""
        every = max(1, self.options.steps // SCORINGS)
        now = step % every == 0 or step == self.options.steps
        return bool(self.scored) and now and self.history.steps[-1:] != [step]

    def facts(self) -> dict[str, Any]:
        """Where the task stands but for its best state, as JSON can hold it."""
        return {
            "history": vars(self.history),
            "loss": self.loss,
            "seconds": self.seconds,
            "began_from": self.began_from,
            "finished": self.finished,
            "cancelled": self.cancelled,
        }

    def restore(self, facts: Mapping[str, Any], best: Snapshot | None) -> None:
        """Stand where `facts` were taken."""
        self.history = History(**facts["history"])
        self.loss, self.seconds = facts["loss"], facts["seconds"]
        self.began_from = tuple(facts["began_from"])
        self.finished, self.cancelled = facts["finished"], facts["cancelled"]
        self.best = best


def learners_of(tasks: Sequence[Prepared]) -> tuple[list[Learner], list[TaskRun]]:
    """Every split's learner and the one for all examples, task after task."""
    learners: list[Learner] = []
    runs: list[TaskRun] = []
    for task in tasks:
        first = len(learners)
        for split in task.splits:
            own, held = (
                tuple(task.encoded[i] for i in part) for part in (split.train, split.held_out)
            )
            learners.append(Learner(own, held, task.options))
        scored = list(range(first, len(learners)))
        learners.append(Learner(task.encoded, (), task.options))
        runs.append(TaskRun(task.name, task.options, scored, keeper=len(learners) - 1))
    return learners, runs
