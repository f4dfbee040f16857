"""How sequences come by rows of the cache, and what is kept of them for others afterwards."""

from abc import ABC, abstractmethod

from polyhead.adapters.plan import adapter_key
from polyhead.server.engine.batch import SourceRow
from polyhead.server.engine.kv_space import KVSpace, Place
from polyhead.server.engine.request import Request
from polyhead.server.engine.sequence import Sequence


def key_of(request: Request) -> str:
    """Equal for requests whose equal tokens have equal keys and values."""
    return adapter_key(request.adapter)


class Reuse(ABC):
    """What the scheduler asks for. Whatever is kept gives way to sequences that run."""

    def __init__(self, space: KVSpace) -> None:
        self._space = space

    @abstractmethod
    def take(self, sequence: Sequence) -> bool:
        """Give a sequence a row for its tokens, holding what can be shared. False when full."""

    @abstractmethod
    def keep(self, sequence: Sequence) -> None:
        """Take over the row of a sequence that needs it no more, if that is worth it."""

    @abstractmethod
    def give_up(self) -> bool:
        """Free what was of use to nobody for longest. False where nothing is kept."""

    def drop(self, sequence: Sequence) -> None:
        """Free a sequence's row without keeping anything of it."""
        self._space.release(sequence)

    def clear(self) -> None:
        """Keep nothing."""
        while self.give_up():
            pass

    def ahead(self, sequence: Sequence) -> int:
        """Tokens beside its own that have to be computed in the step that a sequence begins in."""
        del sequence
        return 0

    def go_on(self) -> list[tuple[Request, int]]:
        """Have what earlier steps have begun computed further in the next step. Answers on whose
        behalf, and how many tokens that costs."""
        return []

    def ready(self, sequence: Sequence) -> bool:
        """Whether all that a sequence needs will be there when its own tokens are computed."""
        del sequence
        return True

    def beside(self, sequence: Sequence) -> Place | None:
        """The row of its source, where a sequence has one."""
        del sequence
        return None

    def drain(self) -> list[SourceRow]:
        """The sources to encode in the next step."""
        return []

    @property
    def used(self) -> int:
        """Tokens of capacity in rows that somebody computes with."""
        return self._space.used
