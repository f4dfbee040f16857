"""One request from its arrival to its last output, as numbers that anybody may read."""

from dataclasses import dataclass, field

from polyhead.server.engine.request import Output, Request
from polyhead.server.logs import Call


@dataclass
class Journey:
    """Times are `time.monotonic`'s, as for `Request.arrival`; None is what never happened."""

    request: Request
    call: Call | None = None  # that asked; None where no HTTP call did
    started: float | None = None  # its first step began: before, it was in line
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0
    """Tokens generated, over all choices."""
    cached_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why each choice ended."""
    error: str | None = None
    """Kind of the error that broke the answer off."""
    last_tokens: dict[int, float] = field(default_factory=dict)
    """When each choice's last token came."""

    def take(self, output: Output, now: float) -> None:
        """Account for one output that came at `now`."""
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if self.started is None:
            self.started = output.started
        if output.token_ids and not self.request.continuations:
            self.tokens += len(output.token_ids)
            if self.first_token is None:
                self.first_token = now
            self.last_tokens[output.index] = now
        if output.finish_reason is not None:
            self.reasons.append(output.finish_reason)

    @property
    def answered(self) -> bool:
        """Whether the answer is whole: neither broken off nor left."""
        return self.error is None and "abort" not in self.reasons

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step."""
        return None if self.started is None else self.started - self.request.arrival

    @property
    def prefill_seconds(self) -> float | None:
        """From the first step to the first token."""
        if self.started is None or self.first_token is None:
            return None
        return self.first_token - self.started

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the last one of any choice."""
        if self.first_token is None:
            return None
        return max(self.last_tokens.values()) - self.first_token

    @property
    def seconds(self) -> float | None:
        """From arrival to the end."""
        return None if self.ended is None else self.ended - self.request.arrival
