"""Routings to send and to receive, from numpy, torch, nested lists or safetensors.

Neither numpy nor torch is imported: arrays and tensors are asked for their lists.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from polyhead.clients.models import Granularity, RoutingKind

EPSILON = 1e-12
"""Added to the sum of a row before dividing, as the server does."""
FORMATS = {"F16": "e", "F32": "f", "F64": "d"}
"""`struct`'s letter for each type of number that can be read; BF16 is the upper half of F32."""


@dataclass(frozen=True)
class Routing:
    """How much of each skill every head uses: the safetensors file of one task's routing.

    The numbers are [modules, heads, skills], [blocks, heads, skills] or [heads, skills], by the
    granularity. Whether they fit an inventory is the server's to say.
    """

    safetensors: bytes

    @classmethod
    def from_logits(cls, values: Any, granularity: Granularity | None = None) -> "Routing":
        """From routing logits: a numpy array, a torch tensor or nested lists.

        granularity: by default `model` for two dimensions and `module` for three. Raises
        `ValueError` on anything but two or three regular dimensions of numbers.
        """
        return cls(_file("logits", values, granularity))

    @classmethod
    def from_weights(cls, values: Any, granularity: Granularity | None = None) -> "Routing":
        """From weights, of which every row sums to 1; otherwise as `from_logits`."""
        return cls(_file("weights", values, granularity))

    @classmethod
    def from_coefficients(cls, values: Any, granularity: Granularity | None = None) -> "Routing":
        """From coefficients, signed and not normalised; otherwise as `from_logits`."""
        return cls(_file("coefficients", values, granularity))

    @classmethod
    def from_safetensors(cls, source: bytes | str | Path) -> "Routing":
        """From a safetensors file, or its bytes, with one tensor, named by its kind.

        Raises `ValueError` where it holds anything else, `OSError` where it cannot be read.
        """
        routing = cls(source if isinstance(source, bytes) else Path(source).read_bytes())
        _ = routing._tensor  # a broken file is told of here, not when it is first used
        return routing

    @classmethod
    def mix(cls, shares: Sequence[tuple["Routing", float]]) -> "Routing":
        """The weighted mean of routings' weights; shares need not sum to 1.

        Where one of them has coefficients, the mean has too.

        Raises `ValueError` on routings of different shapes, and on shares that are not positive.
        """
        total = sum(share for _, share in shares)
        if not shares or any(share <= 0 for _, share in shares) or not math.isfinite(total):
            raise ValueError(f"shares: found {[share for _, share in shares]}, expected positive")
        first = shares[0][0]
        for routing, _ in shares:
            if (routing.shape, routing.granularity) != (first.shape, first.granularity):
                raise ValueError(
                    f"only routings of one shape can be mixed: found {list(routing.shape)} per "
                    f"{routing.granularity} beside {list(first.shape)} per {first.granularity}"
                )
        columns = zip(*(routing._weights() for routing, _ in shares), strict=True)
        parts = [share / total for _, share in shares]
        mixed = [sum(p * w for p, w in zip(parts, column, strict=True)) for column in columns]
        kind: RoutingKind = "weights"
        if any(routing.kind == "coefficients" for routing, _ in shares):
            kind = "coefficients"
        return cls(_pack(kind, mixed, first.shape, first.granularity))

    @property
    def kind(self) -> RoutingKind:
        """Whether the numbers are logits, weights or coefficients."""
        kind: RoutingKind = self._tensor[0]
        return kind

    @property
    def granularity(self) -> Granularity:
        """Whether modules have routings of their own, share one per block, or one in all."""
        granularity: Granularity = self._header.get("__metadata__", {}).get("granularity", "module")
        return granularity

    @property
    def shape(self) -> tuple[int, ...]:
        """`[modules, heads, skills]`, `[blocks, heads, skills]` or `[heads, skills]`."""
        return tuple(self._tensor[1]["shape"])

    def tolist(self) -> list[Any]:
        """The numbers as they were given, as nested lists of the routing's shape."""
        return _nested(self._values(), self.shape)

    def weights(self) -> list[Any]:
        """The weights that the numbers stand for: `sigmoid(logits)`, divided by the row's sum.

        Coefficients are used as they are, and so are weights.
        """
        return _nested(self._weights(), self.shape)

    def save(self, path: str | Path) -> None:
        """Write the safetensors file."""
        Path(path).write_bytes(self.safetensors)

    @cached_property
    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self.safetensors[:8], "little")
        try:
            header = json.loads(self.safetensors[8 : 8 + length])
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise ValueError("not a safetensors file: its header is not a JSON object")
        return header

    @cached_property
    def _tensor(self) -> tuple[Any, dict[str, Any]]:
        tensors = {name: at for name, at in self._header.items() if name != "__metadata__"}
        if len(tensors) != 1 or next(iter(tensors)) not in get_args(RoutingKind):
            raise ValueError(
                f"wrong tensors: found {sorted(tensors)}, "
                "expected one named logits, weights or coefficients"
            )
        return next(iter(tensors.items()))

    def _values(self) -> Sequence[float]:
        _, tensor = self._tensor
        start, end = tensor["data_offsets"]
        shift = 8 + int.from_bytes(self.safetensors[:8], "little")
        data = self.safetensors[shift + start : shift + end]
        if tensor["dtype"] == "BF16":
            pairs = (data[i : i + 2] for i in range(0, len(data), 2))
            data, letter = b"".join(b"\0\0" + pair for pair in pairs), "f"
        elif tensor["dtype"] in FORMATS:
            letter = FORMATS[tensor["dtype"]]
        else:
            raise ValueError(f"numbers of type {tensor['dtype']} are not read")
        return struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)

    def _weights(self) -> Sequence[float]:
        values, width = self._values(), self.shape[-1]
        if self.kind != "logits":
            return values
        rows = (values[i : i + width] for i in range(0, len(values), width))
        return list(chain.from_iterable(map(_fold, rows)))


def _fold(logits: Sequence[float]) -> list[float]:
    # tanh does not overflow where exp does.
    s = [0.5 * (1 + math.tanh(0.5 * value)) for value in logits]
    return [one / (sum(s) + EPSILON) for one in s]


def _file(kind: RoutingKind, values: Any, granularity: Granularity | None) -> bytes:
    lists = values.tolist() if hasattr(values, "tolist") else values
    flat, shape = _flatten(lists, kind)
    if len(shape) not in (2, 3):
        raise ValueError(f"{kind}: found {len(shape)} dimensions, expected 2 or 3")
    if granularity is None:
        granularity = "model" if len(shape) == 2 else "module"
    elif (granularity == "model") != (len(shape) == 2):
        wanted = 2 if granularity == "model" else 3
        raise ValueError(
            f"{kind}: found {len(shape)} dimensions, expected {wanted} for one per {granularity}"
        )
    return _pack(kind, flat, shape, granularity)


def _flatten(values: Any, path: str) -> tuple[list[float], tuple[int, ...]]:
    """All numbers in order, and the shape; irregular lists are refused."""
    if isinstance(values, int | float):
        return [float(values)], ()
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{path}: found {values!r}, expected numbers or a list of them")
    parts = [_flatten(value, f"{path}[{index}]") for index, value in enumerate(values)]
    inner = parts[0][1]
    for index, (_, shape) in enumerate(parts):
        if shape != inner:
            raise ValueError(
                f"{path}[{index}]: found shape {list(shape)}, expected {list(inner)} as before it"
            )
    return list(chain.from_iterable(flat for flat, _ in parts)), (len(parts), *inner)


def _pack(
    kind: RoutingKind, flat: Sequence[float], shape: tuple[int, ...], granularity: Granularity
) -> bytes:
    """A safetensors file: the length of the header, the header as JSON, the numbers."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * len(flat)]}
    metadata: Mapping[str, str] = {"granularity": granularity}
    header = json.dumps({"__metadata__": metadata, kind: tensor}).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + struct.pack(f"<{len(flat)}f", *flat)


def _nested(flat: Sequence[float], shape: tuple[int, ...]) -> list[Any]:
    nested: list[Any] = list(flat)
    for width in reversed(shape[1:]):
        nested = [nested[i : i + width] for i in range(0, len(nested), width)]
    return nested
