"""What has joined the waiting line lately: about as much of it will come before those who wait."""

from collections import defaultdict, deque
from math import inf

from polyhead.server.engine.request import Request


class Arrivals:
    """Tokens by task that joined in the last `seconds` in which the engine was busy.

    Memory is bounded by the requests of that time; those of an infinite time are not kept.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0.0
        self._joined: deque[tuple[float, int, str, float]] = deque()
        self._by_task: dict[int, dict[str, float]] = defaultdict(dict)  # by priority
        self._sums: dict[int, float] = defaultdict(float)

    def joins(self, request: Request, tokens: float) -> None:
        if self._seconds < inf:
            self._joined.append((self._now, request.priority, request.task, tokens))
            self._add(request.priority, request.task, tokens)

    def pass_time(self, seconds: float) -> None:
        self._now += seconds
        while self._joined and self._joined[0][0] < self._now - self._seconds:
            _, priority, task, tokens = self._joined.popleft()
            self._add(priority, task, -tokens)

    def overtaking(self, own_task: str, own_priority: int, own_line: float) -> float:
        """Tokens of other tasks that would go before the last of `own_line` waiting tokens, did
        each bring as much again: of one task with another, at most as much as the own line.

        Looked up, not added up: under overload it is asked for every request, of many tasks.
        """
        tokens = tasks = 0.0
        for priority, by_task in self._by_task.items():
            if priority <= own_priority:
                tokens += self._sums[priority] - by_task.get(own_task, 0.0)
                tasks += len(by_task) - (own_task in by_task)
        return min(tokens, tasks * own_line)

    def _add(self, priority: int, task: str, tokens: float) -> None:
        by_task = self._by_task[priority]
        by_task[task] = by_task.get(task, 0.0) + tokens
        self._sums[priority] += tokens
        if by_task[task] < 1:
            del by_task[task]
        if not by_task:
            del self._by_task[priority], self._sums[priority]
