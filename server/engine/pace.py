"""How long a new request would wait: by what is in line before it, and how fast the engine works.

Called with the engine's lock held.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import exp, inf
from typing import NamedTuple

from polyhead.server.engine.arrivals import Arrivals
from polyhead.server.engine.request import Request
from polyhead.server.engine.sequence import Sequence

MEMORY_SECONDS = 5.0
"""Of busy steps: what lies further back weighs less than 1/e."""
LEARNT = 0.05
"""What one answer counts in how much of `max_tokens` answers use."""
PATIENCE = 1.25
"""How much longer than expected a request lets later ones of less served tasks go before it. At 1,
a crowd that others have held up a little holds up all of them; the larger, the longer a task that
many others come before waits beyond what was expected when it was let in."""


class _Waiting(NamedTuple):
    priority: int
    task: str
    prompt: float  # tokens
    work: float  # tokens, with those of the answer
    ahead: float  # tokens that were expected to be computed first


class Pace:
    """Adds up the tokens that wait, and measures tokens a second of the steps that leave a line.

    Steps that take in all there is do not count: a small batch is slow for its tokens, and does not
    tell how fast a full one would be. Until one has left a line, no wait is expected.

    longest: seconds of waiting that are of interest. What joins is expected to come as it did in as
    many seconds before.
    """

    def __init__(self, longest: float = inf) -> None:
        self._arrivals = Arrivals(longest)
        self._rate: float | None = None  # tokens per second
        self._used = 1.0  # of max_tokens, by answers that have ended
        self._waiting: dict[str, _Waiting] = {}
        self._free_seats = 0  # that the last step left
        self._crowded = False  # it left a line

    def ahead_of(self, request: Request) -> float:
        """Tokens that would be computed before a request that comes now begins.

        Tasks take turns, so a newcomer waits for its own task's requests and as much of each other
        task's, not for all that a crowd has put in line. As long as its own task has others before
        it, later ones of other tasks go before it, too.
        """
        return self._ahead(request.task, request.priority, *self._work(request))

    def least_ahead_of(self, task: str, priority: int, answer: int) -> float:
        """The same for a request of which only that is known: whose it is, how urgent, and that it
        may take `answer` tokens."""
        return self._ahead(task, priority, 1, 1 + answer * self._used)

    def seconds(self, tokens: float) -> float:
        """How long so many tokens take; 0 until a step has left a line."""
        return 0.0 if self._rate is None else tokens / self._rate

    def patience_of(self, request_id: str) -> float:
        """Tokens after which a waiting request is to be overtaken no more, from when it joined."""
        waiting = self._waiting.get(request_id)
        return inf if waiting is None else PATIENCE * (waiting.ahead + waiting.work)

    def joins(self, request: Request, ahead: float) -> None:
        """It was let in with so many tokens to wait for."""
        prompt, work = self._work(request)
        self._waiting[request.id] = _Waiting(request.priority, request.task, prompt, work, ahead)
        self._arrivals.joins(request, work)

    def begun(self, request_ids: Iterable[str], free_seats: int, left: int) -> None:
        """These are in the step that begins now, which leaves so many seats free and sequences in
        line; ids that did not wait are ignored.
        """
        for name in request_ids:
            self._waiting.pop(name, None)
        self._free_seats = free_seats
        self._crowded = left > 0

    def stepped(self, tokens: int, seconds: float) -> None:
        """Account for the step that has begun last."""
        self._arrivals.pass_time(seconds)
        if not self._crowded or seconds <= 0:
            return
        weight = 1.0 if self._rate is None else 1 - exp(-seconds / MEMORY_SECONDS)
        self._rate = (self._rate or 0.0) + weight * (tokens / seconds - (self._rate or 0.0))

    def ended(self, sequence: Sequence) -> None:
        """A choice has ended, whether it had begun or not."""
        self._waiting.pop(sequence.request.id, None)
        if sequence.generated and sequence.sample:
            share = len(sequence.generated) / sequence.request.params.max_tokens
            self._used += LEARNT * (share - self._used)

    def _ahead(self, own_task: str, own_priority: int, prompt: float, work: float) -> float:
        """Tokens that come first. Where a seat is free for all in line, that is their prompts."""
        seated = len(self._waiting) < self._free_seats
        before: dict[str, float] = defaultdict(float)
        for other in self._waiting.values():
            if other.priority <= own_priority:
                before[other.task] += other.prompt if seated else other.work
        if not before:
            return 0.0
        line = before[own_task]
        own = line + (prompt if seated else work)
        later = 0.0 if seated else self._arrivals.overtaking(own_task, own_priority, line)
        return later + sum(min(tokens, own) for tokens in before.values())

    def _work(self, request: Request) -> tuple[float, float]:
        """Tokens: given as a prompt, and in all."""
        given = float(len(request.asked))
        if request.continuations:
            return given, given + sum(map(len, request.continuations))
        params = request.params
        return given, given + params.n * params.max_tokens * self._used
