"""Rows of sequences that have ended, kept for those that begin alike. Plain bookkeeping.

Keys and values depend on the adapter as much as on the tokens, so both tell what begins alike:
a row of another task, or of a task's former generation, is never found.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.request import Request
from polyhead.server.engine.reuse import Reuse, key_of
from polyhead.server.engine.sequence import Sequence as Tokens

BLOCK = 16
"""Tokens between two points at which a row can be found; shorter beginnings are not shared."""
SALT = secrets.randbits(64)
"""So that nobody can write prompts whose marks collide, which would slow every look-up down."""


@dataclass(eq=False)
class Prefix:
    """The owner of a kept row: whose tokens it holds, and the points at which it is found."""

    key: str
    tokens: list[int]
    marks: list[int]


class PrefixCache(Reuse):
    """At most `max_tokens` of the cache's capacity, least recently used first to go.

    It lives in the memory that sequences leave free, and gives it up whenever one needs it.
    """

    def __init__(
        self, space: KVSpace, max_tokens: int, key: Callable[[Request], str] = key_of
    ) -> None:
        super().__init__(space)
        self._max_tokens = max_tokens
        self._key = key
        self._kept: OrderedDict[Prefix, None] = OrderedDict()
        self._at: dict[int, dict[Prefix, None]] = {}  # by every mark, the newest last
        self._ending: dict[int, dict[Prefix, None]] = {}  # by the last mark

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, sequence: Tokens) -> None:
        """Take over the row of a sequence that needs it no more, if that is worth it."""
        tokens = sequence.tokens[: sequence.computed]
        key = self._key(sequence.request)
        marks = list(_marks(key, tokens))
        if not marks or not self._max_tokens or self._covered(key, tokens, marks):
            self._space.release(sequence)
            return
        for shorter in self._within(key, tokens, marks):
            self._drop(shorter)
        prefix = Prefix(key, tokens, marks)
        room = self._max_tokens - self._space.row_capacity(len(tokens))
        while self._space.parked > room and self.give_up():
            pass
        if self._space.parked > room or not self._park(sequence, prefix):
            self._space.release(sequence)
            return
        self._kept[prefix] = None
        for mark in marks:
            self._at.setdefault(mark, {})[prefix] = None
        self._ending.setdefault(marks[-1], {})[prefix] = None

    def find(self, sequence: Tokens) -> tuple[Prefix, int] | None:
        """The kept row that begins most like a sequence, and for how many tokens: the last one, and
        all whose logits or hidden states are wanted, are left to be computed."""
        wanted = sequence.unscored or sequence.unembedded
        most = min([len(sequence.tokens) - 1, *([wanted.start] if wanted else [])])
        tokens, key = sequence.tokens[:most], self._key(sequence.request)
        farthest: dict[Prefix, None] = {}
        for mark in _marks(key, tokens):
            if mark not in self._at:
                break
            farthest = self._at[mark]
        prefix = next(reversed(farthest), None)
        if prefix is None or prefix.key != key:
            return None
        common = _common(prefix.tokens, tokens)
        if common < BLOCK:
            return None
        self._kept.move_to_end(prefix)
        return prefix, common

    def take(self, sequence: Tokens) -> bool:
        """A row that begins with what was computed before for the same tokens, if anything was."""
        found, length = self.find(sequence), len(sequence.tokens)
        if found is None:
            return self._space.reserve(sequence, length)
        prefix, shared = found
        if not self._space.fork(prefix, sequence, length, shared):
            return False
        sequence.computed = shared
        if not sequence.generated:
            sequence.cached = shared
        return True

    def give_up(self) -> bool:
        """Free the least recently used row. False where none is left."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept)))
        return True

    def _park(self, sequence: Tokens, prefix: Prefix) -> bool:
        while not self._space.park(sequence, prefix, len(prefix.tokens)):
            if not self.give_up():
                return False
        return True

    def _drop(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        for mark in prefix.marks:
            _take_out(self._at, mark, prefix)
        _take_out(self._ending, prefix.marks[-1], prefix)
        self._space.release(prefix)

    def _covered(self, key: str, tokens: list[int], marks: list[int]) -> bool:
        """Whether a kept row begins with all of these tokens; it counts as used then."""
        for prefix in self._at.get(marks[-1], ()):
            if prefix.key == key and prefix.tokens[: len(tokens)] == tokens:
                self._kept.move_to_end(prefix)
                return True
        return False

    def _within(self, key: str, tokens: list[int], marks: list[int]) -> list[Prefix]:
        """Kept rows that are a beginning of these tokens: of no use beside them."""
        near = [prefix for mark in marks for prefix in self._ending.get(mark, ())]
        return [p for p in near if p.key == key and tokens[: len(p.tokens)] == p.tokens]


def _take_out(index: dict[int, dict[Prefix, None]], mark: int, prefix: Prefix) -> None:
    del index[mark][prefix]
    if not index[mark]:
        del index[mark]


def _marks(key: str, tokens: Sequence[int]) -> Iterator[int]:
    """A hash for every whole block: of the key and all tokens up to its end. Hashes only find;
    tokens are compared before anything is shared."""
    mark = hash((SALT, key))
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        mark = hash((mark, *tokens[end - BLOCK : end]))
        yield mark


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
