"""One step as it is told to the processes that hold the backbone's other parts: JSON and bytes.

Which adapters they know is the leading process's business: it sends each once, and says when one
is to be forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polyhead.adapters.plan import Adapter, PreparedAdapter, RoutedTask, adapter_key
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.tensor_files import dump_tensors, parse_tensors
from polyhead.server.engine.kv_space import Clear, Copy, KVOperation, Place, Resize

Message = dict[str, Any]
KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (Resize, Copy, Clear)}
PLACES = ("source", "target", "place")
MOST_BYTES = 256 << 20
"""Of adapters that the other processes keep between steps."""


def operations_as_json(operations: Iterable[KVOperation]) -> list[Message]:
    """Operations on the cache, in their order."""
    return [{"kind": type(operation).__name__, **asdict(operation)} for operation in operations]


def operations_of(found: Iterable[Message]) -> list[KVOperation]:
    """The inverse of `operations_as_json`."""
    operations: list[KVOperation] = []
    for entry in found:
        fields = {k: Place(**v) if k in PLACES else v for k, v in entry.items() if k != "kind"}
        operations.append(KINDS[entry["kind"]](**fields))
    return operations


class Told:
    """What the other processes know of adapters, least recently used first."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def news(self, adapters: Sequence[Adapter]) -> tuple[Message, bytes]:
        """What has to be told before a step of these: new ones with their numbers, and who makes
        room for them."""
        own = {adapter_key(adapter): adapter for adapter in adapters if adapter is not None}
        new, blobs = [], []
        for key, adapter in own.items():
            if key not in self._sizes:
                blob = _packed(adapter)
                new.append({"key": key, "routed": isinstance(adapter, RoutedTask), "n": len(blob)})
                blobs.append(blob)
                self._sizes[key] = len(blob)
            self._sizes.move_to_end(key)
        return {"new": new, "forget": self._make_room(own.keys())}, b"".join(blobs)

    def _make_room(self, needed: Iterable[str]) -> list[str]:
        gone, kept = [], set(needed)
        held = sum(self._sizes.values())
        for key in list(self._sizes):
            if held <= self._most_bytes:
                break
            if key not in kept:
                held -= self._sizes.pop(key)
                gone.append(key)
        return gone


class Known:
    """The other side of `Told`: adapters by key, as they are to be planned with."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {"": None}

    def take(self, message: Message, data: bytes) -> list[tuple[str, PrivateAdapter]]:
        """Note what `Told.news` said. Returns the private ones, which are to be prepared and then
        given to `keep`."""
        for key in message["forget"]:
            del self._adapters[key]
        private, start = [], 0
        for entry in message["new"]:
            tensors, _ = parse_tensors(data[start : start + entry["n"]])
            start += entry["n"]
            if entry["routed"]:
                self.keep(RoutedTask(entry["key"], tensors["weights"]))
            else:
                private.append((entry["key"], _private(tensors)))
        return private

    def keep(self, adapter: RoutedTask | PreparedAdapter) -> None:
        """Remember an adapter until it is to be forgotten."""
        self._adapters[adapter.key] = adapter

    def __getitem__(self, key: str) -> Adapter:
        return self._adapters[key]


def _packed(adapter: Adapter) -> bytes:
    if isinstance(adapter, RoutedTask):
        return dump_tensors({"weights": adapter.weights}, {})
    whole = adapter.whole if isinstance(adapter, PreparedAdapter) else adapter
    assert whole is not None  # the planner keeps it where layers are cut
    return whole.to_safetensors()


def _private(tensors: Mapping[str, Any]) -> PrivateAdapter:
    return PrivateAdapter(
        {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")},
        {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")},
    )
