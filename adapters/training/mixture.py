"""Which examples each step learns from: a function of the seed and the step alone.

So a run that goes on from a checkpoint sees what it would have seen, with nothing to store.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from polyhead.adapters.training.answers import Encoded


class Mixture:
    """Draws tasks, and each task's examples in shuffled order, all before any comes again."""

    def __init__(
        self,
        tasks: Sequence[Sequence[Encoded]],
        *,
        tasks_per_step: int,
        examples_per_task: int,
        sampling: Literal["balanced", "proportional"],
        seed: int,
    ) -> None:
        """tasks: each task's examples; its place is its number."""
        self._tasks = tasks
        self._tasks_per_step = tasks_per_step
        self._each = examples_per_task
        self._sampling = sampling
        self._seed = seed

    def steps(self, start: int = 0) -> Iterator[list[tuple[int, Encoded]]]:
        """Endless: pairs of task and example for step `start` and all later ones."""
        drawn = self._drawn_tasks()
        streams = [self._stream(task) for task in range(len(self._tasks))]
        step = 0
        while True:
            chosen = [next(drawn) for _ in range(self._tasks_per_step)]
            found = [(task, next(streams[task])) for task in chosen for _ in range(self._each)]
            if step >= start:
                yield found
            step += 1

    def _drawn_tasks(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed}/tasks")
        numbers = range(len(self._tasks))
        if self._sampling == "proportional":
            sizes = [len(examples) for examples in self._tasks]
            while True:
                yield chance.choices(numbers, sizes)[0]
        while True:
            yield from chance.sample(numbers, len(numbers))

    def _stream(self, task: int) -> Iterator[Encoded]:
        examples = self._tasks[task]
        chance = random.Random(f"{self._seed}/task/{task}")
        while True:
            yield from (examples[i] for i in chance.sample(range(len(examples)), len(examples)))


def shares(drawn: Sequence[tuple[int, Encoded]], parts: int) -> list[list[tuple[int, Encoded]]]:
    """A step's examples in exactly `parts` parts of about equal work, tasks kept together.

    There must be at least as many examples as parts.
    """
    ordered = deque(sorted(drawn, key=lambda pair: pair[0]))
    left = sum(len(one) for _, one in ordered)
    found = []
    for after in reversed(range(parts)):
        own = [ordered.popleft()]
        size = len(own[0][1])
        wanted = left / (after + 1)
        while len(ordered) > after and (not after or size + len(ordered[0][1]) / 2 <= wanted):
            own.append(ordered.popleft())
            size += len(own[-1][1])
        left -= size
        found.append(own)
    return found
