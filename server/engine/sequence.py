"""One choice of a request on its way through the engine."""

import secrets
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from polyhead.server.engine.request import Request, TokenLogprob

if TYPE_CHECKING:
    from polyhead.server.engine.constraint import Cursor


@dataclass(eq=False)
class Sequence:
    """Tokens so far, and how many of them have their keys and values in the cache.

    There is one kind of step: compute the tokens that are not computed yet, all or a chunk; when
    none is left, the next one is sampled. A preempted sequence merely forgets what was computed.
    """

    request: Request
    index: int
    tokens: list[int]
    sample: bool = True  # False: the tokens are given, only their log-probabilities are wanted
    computed: int = 0
    cached: int = 0  # tokens of the prompt that were found computed
    seed: int = 0
    patience: float = inf  # tokens of all that may be computed before it goes first
    due: float = inf  # what the line's count of them is then
    stem: "Sequence | None" = None  # holds the shared prompt's keys and values
    branches: "list[Sequence]" = field(default_factory=list)  # of a stem: who still needs it
    logprobs: list[TokenLogprob] = field(default_factory=list)
    hidden: list[float] = field(default_factory=list)  # [D], the sum over the embedded tokens
    embedded: int = 0
    cursor: "Cursor | None" = None  # in the grammar that the answer is held to

    @property
    def remaining(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> Ordered[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def unscored(self) -> range:
        """Positions before given tokens whose log-probabilities are wanted and not known yet.

        Preemption forgets keys and values only, so nothing is scored twice.
        """
        request = self.request
        if self.index == STEM or request.embeds or not (request.continuations or request.echo):
            return range(0)
        first = 0 if request.echo else len(request.prompt) - 1
        given = len(request.prompt) if self.sample else len(self.tokens)
        return range(first + len(self.logprobs), given - 1)

    @property
    def unembedded(self) -> range:
        """Positions whose hidden states are wanted and not added up yet; after a preemption, too,
        each is added once."""
        return range(self.embedded, len(self.tokens) if self.request.embeds else 0)

    @property
    def prefilling(self) -> bool:
        return self.remaining > 1

    @property
    def order(self) -> tuple[int, float, int]:
        """Who goes first among the sequences of one task."""
        return (self.request.priority, self.request.arrival, self.index)


STEM = -1
"""Index of a sequence that only computes a prompt for the choices that share it."""


def sequences_of(request: Request) -> list[Sequence]:
    """What to put in line for a request: its only choice, or a stem that carries the choices.

    The stem computes all but the prompt's last token; every choice computes that one itself, so
    each gets its own logits to sample from. Choices that echo the prompt compute all of it, and
    those that answer a source share what the encoder makes of that instead.
    """
    prompt = list(request.prompt)
    if request.continuations:
        bodies = [prompt + list(tail) for tail in request.continuations]
    else:
        bodies = [list(prompt) for _ in range(request.params.n)]
    given = request.params.seed
    seed = secrets.randbits(63) if given is None else given
    grammar = request.params.grammar
    choices = [
        Sequence(
            request,
            index,
            body,
            sample=not request.continuations,
            seed=seed,
            cursor=None if grammar is None else grammar.cursor(),
        )
        for index, body in enumerate(bodies)
    ]
    if len(choices) == 1 or len(prompt) < 2 or request.echo or request.source:
        return choices
    stem = Sequence(request, STEM, prompt[:-1], sample=False, branches=choices)
    for choice in choices:
        choice.stem = stem
    return [stem]
