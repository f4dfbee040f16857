"""The waiting line: first come first served within a task, fair between tasks."""

import bisect
from collections.abc import Iterator

from polyhead.server.engine.sequence import Sequence

Urgency = tuple[int, float, tuple[int, float, int]]


class WaitingLine:
    """Sequences that wait for a seat, by priority and task.

    Fairness is a virtual token counter per task (Sheng et al., 2023, arXiv 2401.00588): the task
    that has been served the fewest tokens goes next. A task that begins to wait starts at least at
    the level of the least served waiting one, or where nobody waits, of the last one that did: so
    nobody saves up a claim, and what a task used of seats that nobody else wanted is no debt.

    Where less served tasks keep coming, that alone would let the others wait for ever. So once as
    many tokens have been computed as a sequence has patience for, it goes first.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, str], list[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._last_to_wait = ""
        self._length = 0
        self._charged = 0  # tokens, of all tasks

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    @property
    def tasks(self) -> set[str]:
        """Whose sequences wait. May be read from any thread."""
        return {task for _, task in list(self._queues)}

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where its arrival says, in front of later ones of its task."""
        task = sequence.request.task
        waiting = {name for _, name in self._queues}
        if task not in waiting:
            level = min(map(self.served, waiting), default=self.served(self._last_to_wait))
            self._served[task] = max(self.served(task), level)
        queue = self._queues.setdefault((sequence.request.priority, task), [])
        bisect.insort(queue, sequence, key=lambda other: other.order)
        self._length += 1
        sequence.due = self._charged + sequence.patience

    def peek(self) -> Sequence | None:
        """Who is next, without taking it."""
        return min((queue[0] for queue in self._queues.values()), key=self.urgency, default=None)

    def urgency(self, sequence: Sequence) -> Urgency:
        """Orders sequences that wait or whose prompt is computed: the least goes first.

        Whose patience has ended are below 0 by how long ago, the others from 1 on.
        """
        if sequence.due <= self._charged:
            return (sequence.request.priority, sequence.due - self._charged, sequence.order)
        return self.turn(sequence)

    def turn(self, sequence: Sequence) -> Urgency:
        """The same by fairness alone, however long it has waited."""
        request = sequence.request
        return (request.priority, 1 + self.served(request.task), sequence.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands. Raises `ValueError` when it does not wait."""
        key = (sequence.request.priority, sequence.request.task)
        self._queues.get(key, []).remove(sequence)
        self._length -= 1
        if not self._queues[key]:
            del self._queues[key]
            self._last_to_wait = sequence.request.task

    def charge(self, task: str, tokens: int) -> None:
        """Count tokens that were computed for a task."""
        self._served[task] = self._served.get(task, 0.0) + tokens
        self._charged += tokens

    def served(self, task: str) -> float:
        return self._served.get(task, 0.0)

    def forget_idle(self, running_tasks: set[str]) -> None:
        """Drop counters of tasks that neither wait nor run, so that memory stays bounded."""
        active = running_tasks | {task for _, task in self._queues} | {self._last_to_wait}
        self._served = {task: self._served[task] for task in active if task in self._served}
