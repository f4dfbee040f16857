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
        self._joined: deque[tuple[float, tuple[int, str], float]] = deque()
        self._tokens: dict[tuple[int, str], float] = defaultdict(float)

    def joins(self, request: Request, tokens: float) -> None:
        if self._seconds == inf:
            return
        key = (request.priority, request.task)
        self._joined.append((self._now, key, tokens))
        self._tokens[key] += tokens

    def pass_time(self, seconds: float) -> None:
        self._now += seconds
        while self._joined and self._joined[0][0] < self._now - self._seconds:
            _, key, tokens = self._joined.popleft()
            self._tokens[key] -= tokens
            if self._tokens[key] < 1:
                del self._tokens[key]

    def overtaking(self, own_task: str, own_priority: int, own_line: float) -> float:
        """Tokens of other tasks that would go before the last of `own_line` waiting tokens, did
        each other task bring as much again: as much of each as the own line, fairly."""
        others: dict[str, float] = defaultdict(float)
        for (priority, task), tokens in self._tokens.items():
            if priority <= own_priority and task != own_task:
                others[task] += tokens
        return sum(min(tokens, own_line) for tokens in others.values())
