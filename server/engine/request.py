"""What enters the engine and what leaves it. No torch, no HTTP."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from polyhead.adapters.plan import Adapter
    from polyhead.server.engine.constraint import Grammar

FinishReason = Literal["stop", "length", "abort", "deadline"]

BASE_TASK = "base"
"""The reserved task id of the bare backbone."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Values are trusted: the HTTP schema validates them."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken once from every token that the answer holds
    frequency_penalty: float = 0.0  # taken each time that the answer holds the token
    seed: int | None = None  # None draws one at admission
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None is off; k gives the chosen token and k alternatives
    ignore_eos: bool = False
    n: int = 1
    grammar: "Grammar | None" = None  # what the answer is held to


@dataclass(frozen=True)
class Request:
    """One admitted request: token ids, the adapter that answers it, and how to sample.

    `continuations` makes it a scoring request: nothing is sampled, and for each continuation the
    log-probabilities of its tokens after the prompt come back. `echo` asks for those of the
    prompt's own tokens, from the second on, beside what is sampled.

    `embeds` asks for the mean hidden state of each continuation instead of log-probabilities; there
    is no prompt then, so that each is read alone.

    `source` is what the encoder of an encoder-decoder reads; `prompt` is then how the decoder
    begins, its start token.
    """

    id: str
    task: str
    generation: str
    prompt: tuple[int, ...]
    adapter: "Adapter" = None  # None is the bare backbone
    params: SamplingParams = field(default_factory=SamplingParams)
    continuations: tuple[tuple[int, ...], ...] = ()
    echo: bool = False
    embeds: bool = False
    source: tuple[int, ...] = ()
    priority: int = 0  # lower runs earlier
    deadline: float | None = None  # on time.monotonic()'s clock
    arrival: float = field(default_factory=time.monotonic)

    @property
    def asked(self) -> tuple[int, ...]:
        """The tokens that the caller has sent to be answered."""
        return self.source or self.prompt


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a chosen token, with the likeliest alternatives at its place.

    Taken from the model's own distribution, before temperature, penalties and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True)
class Output:
    """What one step added to one choice of a request. The last one has a finish reason.

    The texts of a choice's outputs, joined, are its whole text. A scoring request gets one Output
    per continuation (`index`), with `logprobs` for its tokens and finish reason "stop".
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens that were not computed again
    started: float | None = None  # with the first output: when the request's first step began
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of an echo, with the choice's first token
    embedding: tuple[float, ...] = ()  # [D], the mean over the tokens of an embedded text


@dataclass(frozen=True)
class Failure:
    """A request ended without an answer: a step it was part of raised, or its adapter overflowed.

    overflow: its own adapter made numbers that are not finite; trying again will not help.
    stray: what its grammar allows next could not be found out in time; nor will it.
    """

    request_id: str
    message: str
    overflow: bool = False
    stray: bool = False


Event = Output | Failure


def row_lengths(request: Request) -> tuple[int, ...]:
    """Most tokens that one of this request's sequences can come to hold; after its source's."""
    longest = max(map(len, request.continuations), default=request.params.max_tokens)
    source = (len(request.source),) if request.source else ()
    return (*source, len(request.prompt) + longest)
