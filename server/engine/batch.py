"""One step's work, as the scheduler hands it to the runner."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyhead.server.engine.kv_space import KVOperation, Place
from polyhead.server.engine.request import TokenLogprob
from polyhead.server.engine.sequence import Sequence

if TYPE_CHECKING:
    from polyhead.adapters.plan import Adapter


@dataclass(frozen=True)
class Row:
    """Compute tokens `[start, start + count)` of a sequence whose cache row is at `place`.

    source: where the keys and values are that cross attention reads, of an encoder-decoder.
    """

    sequence: Sequence
    start: int
    count: int
    place: Place
    source: Place | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether this step yields the sequence's next token."""
        return self.sequence.sample and self.stop == len(self.sequence.tokens)

    @property
    def scored(self) -> range:
        """Positions whose logits give the log-probability of a given token that follows."""
        wanted = self.sequence.unscored
        return range(max(self.start, wanted.start), min(self.stop, wanted.stop))

    @property
    def embedded(self) -> range:
        """Positions whose hidden states are wanted."""
        wanted = self.sequence.unembedded
        return range(max(self.start, wanted.start), min(self.stop, wanted.stop))


@dataclass(frozen=True)
class SourceRow:
    """Encode a source, or one of several portions of the encoder's layers, and after the last one
    leave the keys and values of cross attention at `place`.

    owner: the same object for all portions of a source; they come in consecutive steps.
    requests: the ids of those that it is encoded for.
    """

    tokens: tuple[int, ...]
    adapter: "Adapter"
    place: Place
    requests: frozenset[str] = frozenset()
    owner: object = None
    portion: int = 0
    portions: int = 1

    @property
    def cost(self) -> int:
        """What this costs, in tokens that go through all layers."""
        return -(-len(self.tokens) // self.portions)


@dataclass(frozen=True)
class Batch:
    """Rows to compute, after the cache operations have been carried out in order and then the
    sources have been encoded, which some of the rows may answer already."""

    rows: Ordered[Row]
    operations: Ordered[KVOperation]
    sources: Ordered[SourceRow] = ()

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows) + sum(s.cost for s in self.sources)

    @property
    def requests(self) -> set[str]:
        """The ids of all requests that this step works for."""
        asked = {row.sequence.request.id for row in self.rows}
        return asked.union(*(source.requests for source in self.sources))


@dataclass(frozen=True)
class Sampled:
    """What a step found for one row: the sampled token, or the scored tokens' logprobs."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    scored: tuple[TokenLogprob, ...] = ()
    hidden: tuple[float, ...] = ()  # [D], the sum over the row's embedded tokens
    stray: bool = False  # what the grammar allows next could not be found out
    overflow: bool = False  # the row's logits are not numbers: its adapter overflows
