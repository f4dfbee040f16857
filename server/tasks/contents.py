"""A task's numbers, as they are stored."""

from dataclasses import dataclass
from typing import Literal

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Granularity, Layout, Routing, RoutingKind
from polyhead.adapters.tensor_files import dump_tensors, parse_tensors
from polyhead.server.tasks.sketch import Sketcher, direction
from polyhead.server.tasks.task import TaskKind

Content = Routing | PrivateAdapter
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class StoredContent:
    """A routing or private adapter, checked against the inventory and ready for the database."""

    fingerprint: str
    data: bytes  # safetensors
    sketch: bytes | None  # None for a private adapter
    kind: TaskKind
    granularity: Granularity | None = None
    routing_kind: RoutingKind | None = None


def pack(
    content: Content, layout: Layout, sketcher: Sketcher, precision: Precision = "float32"
) -> StoredContent:
    """Raises `RoutingError` or `PrivateAdapterError` where `content` does not fit the layout.

    With float16 a routing is rounded first: what comes back, is served and is hashed is exactly
    what was stored.
    """
    if isinstance(content, Routing):
        halved = content.values.half() if precision == "float16" else None
        values = content.values if halved is None else halved
        routing = Routing.checked(values, layout, content.kind, content.granularity)
        numbers = routing.values if halved is None else halved
        return StoredContent(
            fingerprint=routing.fingerprint,
            data=dump_tensors({routing.kind: numbers}, {"granularity": routing.granularity}),
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
