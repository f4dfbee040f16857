"""A task's routing: how much of each skill every head of every module uses."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polyhead.adapters.errors import RoutingError
from polyhead.adapters.tensor_files import dump_tensors, parse_tensors

Granularity = Literal["module", "block", "model"]
RoutingKind = Literal["logits", "weights", "coefficients"]
"""Logits are folded to weights; weights are not negative and sum to 1; coefficients are any numbers
and used as they are, as a hyper-network's task embedding is."""

EPSILON = 1e-12
"""Added to the row sum before dividing (Polytropon's and PEFT's constant)."""
ROW_SUM_TOLERANCE = 1e-3
"""How far a row of given weights may be from 1: enough for float16 and for decimal JSON."""
MAX_COEFFICIENT = 65504.0
"""Of a coefficient's size: what float16 holds, and far from where its square overflows float32."""


@dataclass(frozen=True)
class Layout:
    """The shape a routing must have to fit an inventory: its modules in order, H and S."""

    modules: tuple[str, ...]
    heads: int
    skills: int

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """For each module the index of its transformer block, counted in order of appearance.

        A module's block is the path up to the first number in its name, number included; modules
        without a number form a block of their own.
        """
        seen: dict[str, int] = {}
        found = (re.match(r"(.*?\.|)\d+(?=\.|$)", name) for name in self.modules)
        keys = [match.group(0) if match else "" for match in found]
        return tuple(seen.setdefault(key, len(seen)) for key in keys)

    def groups(self, granularity: Granularity) -> tuple[int, ...]:
        """For each module the row of a routing of this granularity that it uses."""
        if granularity == "module":
            return tuple(range(len(self.modules)))
        return self.blocks if granularity == "block" else (0,) * len(self.modules)

    def shape(self, granularity: Granularity) -> tuple[int, ...]:
        """`[M, H, S]`, `[blocks, H, S]` or `[H, S]`."""
        tail = (self.heads, self.skills)
        return tail if granularity == "model" else (max(self.groups(granularity)) + 1, *tail)


def fold(logits: Tensor) -> Tensor:
    """Weights of routing logits: `w = s / (sum_S s + 1e-12)`, `s = sigmoid(logits)`, in float32.

    Source: Polytropon (arXiv 2202.13914) as PEFT and mttl implement it. logits `[..., S]`.
    Very negative rows underflow to zero weights, never to NaN.
    """
    s = torch.sigmoid(logits.to(torch.float32))
    return s / (s.sum(-1, keepdim=True) + EPSILON)


@dataclass(frozen=True, eq=False)
class Routing:
    """One task's routing as it was given: `values` float32 on the CPU, of the granularity's shape.

    Build it with `from_nested`, `from_safetensors` or `checked`, which validate; the constructor
    does not.
    """

    values: Tensor  # [M, H, S], [B, H, S] or [H, S]
    kind: RoutingKind = "logits"
    granularity: Granularity = "module"

    @classmethod
    def checked(
        cls,
        values: Tensor,
        layout: Layout,
        kind: RoutingKind = "logits",
        granularity: Granularity = "module",
        field: str = "routing",
    ) -> "Routing":
        """Validate shape and numbers. Raises `RoutingError` that names the offending entry."""
        path = f"{field}.{kind}"
        wanted = layout.shape(granularity)
        if tuple(values.shape) != wanted:
            raise RoutingError(
                f"wrong shape for granularity {granularity!r}",
                field=path,
                found=str(list(values.shape)),
                expected=str(list(wanted)),
            )
        if not values.is_floating_point():
            raise RoutingError(
                "wrong dtype", field=path, found=str(values.dtype), expected="floating point"
            )
        values = values.to(torch.float32).contiguous()
        _refuse_where(~torch.isfinite(values), values, path, "a finite number")
        if kind == "weights":
            _refuse_where(values < 0, values, path, "a weight of at least 0")
            sums = values.sum(-1)
            _refuse_where((sums - 1).abs() > ROW_SUM_TOLERANCE, sums, path, "rows that sum to 1")
        if kind == "coefficients":
            large = f"a number between -{MAX_COEFFICIENT:g} and {MAX_COEFFICIENT:g}"
            _refuse_where(values.abs() > MAX_COEFFICIENT, values, path, large)
        return cls(values, kind, granularity)

    @classmethod
    def from_nested(
        cls,
        values: Sequence[Any],
        layout: Layout,
        kind: RoutingKind = "logits",
        granularity: Granularity = "module",
        field: str = "routing",
    ) -> "Routing":
        """From nested lists of numbers, as JSON carries them."""
        try:
            tensor = torch.tensor(values, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, OverflowError) as exc:
            raise RoutingError(
                "not a regular nested list of numbers",
                field=f"{field}.{kind}",
                found=str(exc),
                expected=f"nested lists of shape {list(layout.shape(granularity))}",
            ) from exc
        return cls.checked(tensor, layout, kind, granularity, field)

    @classmethod
    def from_safetensors(cls, data: bytes, layout: Layout, field: str = "routing") -> "Routing":
        """From a safetensors file with one tensor, named by its kind; the granularity may stand in
        its metadata. Raises `RoutingError` on anything else."""
        try:
            tensors, metadata = parse_tensors(data)
        except ValueError as exc:
            raise RoutingError(str(exc), field=f"{field}.safetensors") from exc
        if len(tensors) != 1 or next(iter(tensors)) not in get_args(RoutingKind):
            raise RoutingError(
                "wrong tensors",
                field=f"{field}.safetensors",
                found=str(sorted(tensors)),
                expected="one tensor named 'logits', 'weights' or 'coefficients'",
            )
        granularity: Any = metadata.get("granularity", "module")
        if granularity not in get_args(Granularity):
            raise RoutingError(
                "unknown granularity in the metadata",
                field=f"{field}.safetensors",
                found=repr(granularity),
                expected="'module', 'block' or 'model'",
            )
        ((name, values),) = tensors.items()
        kind: Any = name
        return cls.checked(values, layout, kind, granularity, field)

    @classmethod
    def uniform(cls, layout: Layout) -> "Routing":
        """Every skill with weight 1/S (MHR-mu's and the zero-shot average's routing)."""
        shape = layout.shape("model")
        return cls(torch.full(shape, 1.0 / layout.skills), "weights", "model")

    def to_safetensors(self) -> bytes:
        """The exact inverse of `from_safetensors`."""
        return dump_tensors({self.kind: self.values}, {"granularity": self.granularity})

    def weights(self, layout: Layout) -> Tensor:
        """`[M, H, S]` float32, whatever the granularity and the kind: what A and B are mixed by."""
        folded = fold(self.values) if self.kind == "logits" else self.values
        if self.granularity == "model":
            folded = folded.unsqueeze(0)
        return folded[list(layout.groups(self.granularity))].contiguous()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that defines this routing."""
        head = f"{self.kind}:{self.granularity}:{list(self.values.shape)}:".encode()
        return hashlib.sha256(head + self.values.numpy().tobytes()).hexdigest()


def mix(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The routing weights of a mixture of tasks: the weighted mean of theirs, or of coefficients.

    parts: pairs of `[M, H, S]` weights and a positive share; shares are normalised to sum to 1.
    Raises `RoutingError` that names the share.
    """
    for index, (_, share) in enumerate(parts):
        if not (isfinite(share) and share > 0):
            raise RoutingError(
                "unusable share", field=f"mixture[{index}]", found=f"{share:g}", expected="above 0"
            )
    total = sum(share for _, share in parts)
    if not parts or not isfinite(total):
        raise RoutingError(
            "shares cannot be normalised", field="mixture", found=f"a sum of {total:g}"
        )
    return torch.stack([weights * (share / total) for weights, share in parts]).sum(0)


def _refuse_where(bad: Tensor, values: Tensor, path: str, expected: str) -> None:
    if not bad.any():
        return
    index = bad.nonzero()[0].tolist()
    raise RoutingError(
        f"{int(bad.sum())} of {bad.numel()} entries are wrong",
        field=path + "".join(f"[{i}]" for i in index),
        found=f"{values[tuple(index)].item():g}",
        expected=expected,
    )
