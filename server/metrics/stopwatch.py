"""Follows one request's outputs and tells whoever wants to know how it went."""

import time
from collections.abc import Callable, Sequence

from polyhead.server.engine.request import Output, Request
from polyhead.server.logs import current_call
from polyhead.server.metrics.counted import Metrics
from polyhead.server.metrics.journey import Journey

Witness = Callable[[Journey], None]
"""Called once for every request, when it has been answered, broken off or left."""


class Stopwatch:
    """Observes one request's latencies as its outputs arrive."""

    def __init__(self, metrics: Metrics, request: Request, witnesses: Sequence[Witness]) -> None:
        self.journey = Journey(request, current_call.get())
        self._metrics = metrics
        self._witnesses = witnesses

    def saw(self, output: Output) -> None:
        """Account for one output."""
        now, metrics, journey = time.monotonic(), self._metrics, self.journey
        before = journey.last_tokens.get(output.index)
        first = journey.first_token is None
        journey.take(output, now)
        if output.index in journey.last_tokens and (tokens := len(output.token_ids)):
            metrics.generation_tokens.inc(tokens)
            if before is not None:
                metrics.inter_token.observe((now - before) / tokens)
            elif first:
                metrics.first_token.observe(now - journey.request.arrival)

    def ended(self, reason: str | None = None, error: str | None = None) -> None:
        """The request is over; `reason` where its outputs do not tell."""
        journey = self.journey
        if journey.ended is not None:
            return
        journey.ended = time.monotonic()
        journey.error = error
        if reason is not None:
            journey.reasons.append(reason)
        self._metrics.ended(journey)
        for witness in self._witnesses:
            witness(journey)
