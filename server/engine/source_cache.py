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
    request: Request  # the first that asked for it
    readers: set[Sequence] = field(default_factory=set)


class SourceCache(Reuse):
    """At most `max_tokens` of capacity for sources that nobody answers at the moment, least
    recently used first to go."""

    def __init__(
        self, space: KVSpace, max_tokens: int, key: Callable[[Request], str] = key_of
    ) -> None:
        super().__init__(space)
        self._max_tokens = max_tokens
        self._key = key
        self._known: dict[Key, Source] = {}
        self._unread: OrderedDict[Source, None] = OrderedDict()
        self._unread_tokens = 0
        self._read_by: dict[Sequence, Source] = {}
        self._to_encode: dict[Source, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def used(self) -> int:
        """Tokens of capacity in rows that somebody computes with."""
        return self._space.used + self._space.parked - self._unread_tokens

    def ahead(self, sequence: Sequence) -> int:
        """Tokens of its source, unless they are encoded or about to be."""
        return 0 if self._key_of(sequence) in self._known else len(sequence.request.source)

    def take(self, sequence: Sequence) -> bool:
        """A row, and the encoded source beside it."""
        source = self._known.get(self._key_of(sequence)) or self._begin(sequence)
        if source is None:
            return False
        self._read(source, sequence)
        if not self._space.reserve(sequence, len(sequence.tokens)):
            self._leave(sequence)
            return False
        if source.request.id != sequence.request.id and not sequence.generated:
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
        """The sources to encode that came up since the last call, where they lie now."""
        found = [
            SourceRow(source.key[1], source.request.adapter, self._space.place(source))
            for source in self._to_encode
        ]
        self._to_encode.clear()
        return found

    def _key_of(self, sequence: Sequence) -> Key:
        return self._key(sequence.request), sequence.request.source

    def _begin(self, sequence: Sequence) -> Source | None:
        source = Source(self._key_of(sequence), sequence.request)
        if not self._space.reserve_aside(source, len(sequence.request.source)):
            return None
        self._known[source.key] = source
        self._to_encode[source] = None
        return source

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
            if source in self._to_encode:
                self._forget(source)

    def _forget(self, source: Source) -> None:
        del self._unread[source], self._known[source.key]
        self._unread_tokens -= self._size(source)
        self._to_encode.pop(source, None)
        self._space.release(source)

    def _size(self, source: Source) -> int:
        return self._space.row_capacity(len(source.key[1]))
