"""A task's numbers, as they are stored."""

from dataclasses import dataclass

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Granularity, Layout, Routing, RoutingKind
from polyhead.adapters.tensor_files import parse_tensors
from polyhead.server.tasks.sketch import Sketcher, direction
from polyhead.server.tasks.task import TaskKind

Content = Routing | PrivateAdapter


@dataclass(frozen=True)
class StoredContent:
    """A routing or private adapter, checked against the inventory and ready for the database."""

    fingerprint: str
    data: bytes  # safetensors
    sketch: bytes | None  # None for a private adapter
    kind: TaskKind
    granularity: Granularity | None = None
    routing_kind: RoutingKind | None = None


def pack(content: Content, layout: Layout, sketcher: Sketcher) -> StoredContent:
    """Raises `RoutingError` or `PrivateAdapterError` where `content` does not fit the layout."""
    if isinstance(content, Routing):
        routing = Routing.checked(content.values, layout, content.kind, content.granularity)
        return StoredContent(
            fingerprint=routing.fingerprint,
            data=routing.to_safetensors(),
            sketch=sketcher.sketch(direction(routing, layout)),
            kind="routing",
            granularity=routing.granularity,
            routing_kind=routing.kind,
        )
    other = sorted(content.a.keys() - set(layout.modules))
    if other:
        raise PrivateAdapterError(
            "names modules that the inventory does not adapt",
            field="private_adapter",
            found=str(other[:3]),
            expected="names among the inventory's modules",
        )
    return StoredContent(content.fingerprint, content.to_safetensors(), None, "private")


def unpack(kind: TaskKind, data: bytes, layout: Layout) -> Content:
    """The inverse of `pack`, exact to the bit."""
    if kind == "routing":
        return Routing.from_safetensors(data, layout)
    tensors, _ = parse_tensors(data)
    a = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")}
    b = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")}
    return PrivateAdapter(a, b)
