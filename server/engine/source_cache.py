"""Encoded sources: each is held while somebody answers it, and kept for those who ask the same.

What the encoder makes of a source depends on the adapter as much as on the tokens, so both tell
what is the same. A source is an owner in the key-value cache: cross attention's keys and values
take the same room for a token as those of the answer, out of the same budget.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from polyhead.server.engine.batch import SourceRow
from polyhead.server.engine.kv_space import KVSpace, Place
from polyhead.server.engine.request import Request
from polyhead.server.engine.reuse import Reuse, key_of
from polyhead.server.engine.sequence import Sequence

Key = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Source:
    """The owner of a row of cross attention's keys and values."""

    key: Key
    asked_by: str  # the id of the first request
    request: Request | None  # that one, until it is encoded: kept, it would hold its adapter
    portions: int  # in which it is encoded
    handed: int = 0  # of those, to a step
    readers: set[Sequence] = field(default_factory=set)

    @property
    def cost(self) -> int:
        """Tokens that a portion counts for."""
        return -(-len(self.key[1]) // self.portions)

    @property
    def ready(self) -> bool:
        return self.handed == self.portions


class SourceCache(Reuse):
    """At most `max_tokens` of capacity for sources that nobody answers at the moment, least
    recently used first to go.

    A source longer than `step_tokens` is encoded in several steps, each of which takes it through
    some of the encoder's `depth` layers and leaves half of the step to others.
    """

    def __init__(
        self,
        space: KVSpace,
        max_tokens: int,
        key: Callable[[Request], str] = key_of,
        *,
        step_tokens: int = 128,
        depth: int = 1,
    ) -> None:
        super().__init__(space)
        self._max_tokens = max_tokens
        self._key = key
        self._step_tokens = step_tokens
        self._depth = depth
        self._known: dict[Key, Source] = {}
        self._unread: OrderedDict[Source, None] = OrderedDict()
        self._unread_tokens = 0
        self._read_by: dict[Sequence, Source] = {}
        self._begun: dict[Source, None] = {}  # some portions of them, not all
        self._to_encode: dict[Source, None] = {}  # in the next step

    def __len__(self) -> int:
        return len(self._known)

    @property
    def used(self) -> int:
        """Tokens of capacity in rows that somebody computes with."""
        return self._space.used + self._space.parked - self._unread_tokens

    def ahead(self, sequence: Sequence) -> int:
        """What the first portion of its source costs, unless that is known already."""
        key = self._key_of(sequence)
        return 0 if key in self._known else self._source(key, sequence).cost

    def go_on(self) -> list[tuple[Request, int]]:
        """Another portion of each source that has been begun."""
        going = list(self._begun)
        for source in going:
            self._hand(source)
        return [(_request(source), source.cost) for source in going]

    def ready(self, sequence: Sequence) -> bool:
        """Whether the last portion of its source has been, or is in the next step."""
        return self._read_by[sequence].ready

    def take(self, sequence: Sequence) -> bool:
        """A row, and the encoded source beside it."""
        source = self._known.get(self._key_of(sequence)) or self._begin(sequence)
        if source is None:
            return False
        self._read(source, sequence)
        if not self._space.reserve(sequence, len(sequence.tokens)):
            self._leave(sequence)
            return False
        if source.asked_by != sequence.request.id and not sequence.generated:
            sequence.cached = len(sequence.request.source)
        return True

    def keep(self, sequence: Sequence) -> None:
        """Free a sequence's row; its source stays where there is room for it."""
        self.drop(sequence)
        while self._unread_tokens > self._max_tokens:
            self.give_up()

    def drop(self, sequence: Sequence) -> None:
        """Free a sequence's row. Its source stays, for it will be wanted again, until memory is."""
        self._space.release(sequence)
        if sequence in self._read_by:
            self._leave(sequence)

    def give_up(self) -> bool:
        """Free the source that nobody has answered for longest. False where each is answered."""
        source = next(iter(self._unread), None)
        if source is None:
            return False
        self._forget(source)
        return True

    def beside(self, sequence: Sequence) -> Place:
        """Where a sequence's source lies."""
        return self._space.place(self._read_by[sequence])

    def drain(self) -> list[SourceRow]:
        """The sources to encode in the next step, where they lie now."""
        found = [
            SourceRow(
                source.key[1],
                _request(source).adapter,
                self._space.place(source),
                frozenset(reader.request.id for reader in source.readers),
                source,
                source.handed - 1,
                source.portions,
            )
            for source in self._to_encode
        ]
        for source in self._to_encode:
            source.request = None if source.ready else source.request
        self._to_encode.clear()
        return found

    def _key_of(self, sequence: Sequence) -> Key:
        return self._key(sequence.request), sequence.request.source

    def _begin(self, sequence: Sequence) -> Source | None:
        source = self._source(self._key_of(sequence), sequence)
        if not self._space.reserve_aside(source, len(sequence.request.source)):
            return None
        self._known[source.key] = source
        self._begun[source] = None
        self._hand(source)
        return source

    def _source(self, key: Key, sequence: Sequence) -> Source:
        halves = -(-len(key[1]) // max(1, self._step_tokens // 2))
        portions = min(halves, self._depth) if len(key[1]) > self._step_tokens else 1
        return Source(key, sequence.request.id, sequence.request, portions)

    def _hand(self, source: Source) -> None:
        source.handed += 1
        self._to_encode[source] = None
        if source.ready:
            del self._begun[source]

    def _read(self, source: Source, sequence: Sequence) -> None:
        if source in self._unread:
            del self._unread[source]
            self._unread_tokens -= self._size(source)
        source.readers.add(sequence)
        self._read_by[sequence] = source

    def _leave(self, sequence: Sequence) -> None:
        source = self._read_by.pop(sequence)
        source.readers.remove(sequence)
        if not source.readers:
            self._unread[source] = None
            self._unread_tokens += self._size(source)
            if source in self._to_encode or not source.ready:
                self._forget(source)

    def _forget(self, source: Source) -> None:
        del self._unread[source], self._known[source.key]
        self._unread_tokens -= self._size(source)
        self._begun.pop(source, None)
        self._to_encode.pop(source, None)
        self._space.release(source)

    def _size(self, source: Source) -> int:
        return self._space.row_capacity(len(source.key[1]))


def _request(source: Source) -> Request:
    assert source.request is not None, "it is let go of with the last portion"
    return source.request
