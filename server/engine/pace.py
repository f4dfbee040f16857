"""How long a new request would wait: by what is in line before it, and how fast the engine works.

Called with the engine's lock held.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import exp

from polyhead.server.engine.request import Request
from polyhead.server.engine.sequence import Sequence

MEMORY_SECONDS = 5.0
"""Of busy steps: what lies further back weighs less than 1/e."""
LEARNT = 0.05
"""What one answer counts in how much of `max_tokens` answers use."""


class Pace:
    """Adds up the tokens that wait, and measures tokens a second of the steps that leave a line.

    Steps that take in all there is do not count: a small batch is slow for its tokens, and does not
    tell how fast a full one would be. Until one has left a line, no wait is expected.
    """

    def __init__(self) -> None:
        self._rate: float | None = None  # tokens per second
        self._used = 1.0  # of max_tokens, by answers that have ended
        self._waiting: dict[str, tuple[int, str, float]] = {}  # priority, task, tokens
        self._free_seats = 0  # that the last step left
        self._crowded = True  # more waited than it left seats for

    def wait_of(self, request: Request) -> float:
        """Seconds until a request that comes now would begin.

        Tasks take turns, so a newcomer waits for its own task's requests and as much of each other
        task's, not for all that a crowd has put in line.
        """
        return self._wait_of(request.task, request.priority, self._work(request))

    def least_wait_of(self, task: str, priority: int, answer: int) -> float:
        """The same for a request of which only that is known: whose it is, how urgent, and that it
        may take `answer` tokens."""
        return self._wait_of(task, priority, 1 + answer * self._used)

    def _wait_of(self, own_task: str, own_priority: int, work: float) -> float:
        if self._rate is None or len(self._waiting) < self._free_seats:
            return 0.0
        before: dict[str, float] = defaultdict(float)
        for priority, task, tokens in self._waiting.values():
            if priority <= own_priority:
                before[task] += tokens
        if not before:
            return 0.0
        own = before[own_task] + work
        return sum(min(tokens, own) for tokens in before.values()) / self._rate

    def joins(self, request: Request) -> None:
        self._waiting[request.id] = (request.priority, request.task, self._work(request))

    def begun(self, request_ids: Iterable[str], free_seats: int) -> None:
        """These are in the step that begins now, which leaves so many seats free; ids that did not
        wait are ignored.
        """
        for name in request_ids:
            self._waiting.pop(name, None)
        self._free_seats = free_seats
        self._crowded = len(self._waiting) > free_seats

    def stepped(self, tokens: int, seconds: float) -> None:
        """Account for the step that has begun last."""
        if not (self._crowded and self._waiting) or seconds <= 0:
            return
        weight = 1.0 if self._rate is None else 1 - exp(-seconds / MEMORY_SECONDS)
        self._rate = (self._rate or 0.0) + weight * (tokens / seconds - (self._rate or 0.0))

    def ended(self, sequence: Sequence) -> None:
        """A choice has ended, whether it had begun or not."""
        self._waiting.pop(sequence.request.id, None)
        if sequence.generated and sequence.sample:
            share = len(sequence.generated) / sequence.request.params.max_tokens
            self._used += LEARNT * (share - self._used)

    def _work(self, request: Request) -> float:
        given = len(request.asked)
        if request.continuations:
            return given + float(sum(map(len, request.continuations)))
        params = request.params
        return given + params.n * params.max_tokens * self._used
