"""What a task of the suite is, before and after it is split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from benchmarks.tasks.sources import Source

HELD_SHARE = 0.4
"""Of the words and emoji; held-out tasks need 264 items each, training tasks up to 1,264."""


class Pair(NamedTuple):
    """A candidate example, best first in its list.

    `entity` names what the pair is about (a word family, an emoji, a time of day). Each entity
    belongs either to the training tasks or to the held-out ones. Empty: nothing to keep apart.
    """

    input: str
    output: str
    entity: str = ""


@dataclass(frozen=True)
class TaskSpec:
    """A task and where its candidates come from.

    `description` is an instruction that a bare model can be prompted with. `choices` are the
    answers of a classification task; its splits are balanced over them.
    """

    name: str
    kind: str
    description: str
    sources: tuple[Source, ...]
    candidates: Callable[[], Iterable[Pair]]
    held_out: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def template(self) -> str:
        """What a model reads: the instruction leads it to what it already knows."""
        return f"{self.description.removesuffix('.')}: {{input}}\n"


def normal(text: str) -> str:
    """How inputs are compared: two that differ in case or in outer spaces are the same."""
    return text.strip().casefold()


def rank(*parts: str) -> str:
    """A fixed pseudo-random order that depends on nothing but the words themselves."""
    return hashlib.sha256("\t".join(parts).encode()).hexdigest()


@cache
def is_held(entity: str) -> bool:
    return int(rank("side", entity)[:8], 16) < HELD_SHARE * 2**32


def at_most(limit: int, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The first so many of each answer, where a few answers have most of the candidates."""
    seen: Counter[str] = Counter()
    for pair in pairs:
        seen[pair.output] += 1
        if seen[pair.output] <= limit:
            yield pair
