"""Figures by task for the busiest, for all others together: thousands of tasks, few series."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

OTHER = "(other)"
"""No task can have this id: it has brackets."""
WATCHED = 8
"""Tasks whose traffic is followed for every one that has a series."""
HALVE_AFTER = 1024
"""Requests after which what was counted weighs half: so that "busiest" means lately."""
LEAD = 1.25
"""How much busier than the least of those with a series a task must be to take its place."""


@dataclass
class TaskFigures:
    """What is counted for a task."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    seconds: float = 0.0

    def add(self, more: "TaskFigures") -> None:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(more, entry.name))


class TopTasks:
    """At most `most` tasks are counted by name at any time.

    Who they are follows the traffic. What a task did while it had no series is in `OTHER`; a
    series that ends is gone and its past is not added to `OTHER`, which would look like traffic.
    So `sum(rate(...))` over all series is right at any time. Memory: 9 times `most` entries.
    Traffic is estimated by the space-saving algorithm (Metwally et al., 2005): a newcomer takes
    over the place, and as its possible error the weight, of the least busy task that is watched.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: dict[str, TaskFigures] = {}
        self._other = TaskFigures()
        self._weights: dict[str, float] = {}
        self._errors: dict[str, float] = {}
        self._seen = 0

    def add(self, task: str, figures: TaskFigures) -> None:
        """Count one request of a task."""
        if self._most:
            self._weigh(task)
            if task not in self._named and self._earns_series(task):
                self._named[task] = TaskFigures()
        self._named.get(task, self._other).add(figures)

    def figures(self) -> Mapping[str, TaskFigures]:
        """By task, and `OTHER`."""
        return {**self._named, OTHER: self._other}

    def _weigh(self, task: str) -> None:
        self._seen += 1
        if self._seen % HALVE_AFTER == 0:
            for table in (self._weights, self._errors):
                table.update({name: value / 2 for name, value in table.items()})
        if task not in self._weights and len(self._weights) >= self._most * WATCHED:
            idle = self._weights.keys() - self._named.keys()
            least = min(idle, key=self._weights.__getitem__)
            self._errors[task] = self._weights[task] = self._weights.pop(least)
            self._errors.pop(least, None)
        self._weights[task] = self._weights.get(task, 0.0) + 1

    def _earns_series(self, task: str) -> bool:
        if len(self._named) < self._most:
            return True
        least = min(self._named, key=lambda name: self._weights.get(name, 0.0))
        sure = self._weights[task] - self._errors.get(task, 0.0)
        if sure <= LEAD * self._weights.get(least, 0.0):
            return False
        del self._named[least]
        return True
