"""The plan of one forward pass: which adapter each token belongs to, and how it is applied."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable
from polyhead.adapters.errors import PlanError
from polyhead.adapters.private import PrivateAdapter


@dataclass(frozen=True, eq=False)
class RoutedTask:
    """A task's routing weights, ready to serve; `key` names the generation they came from."""

    key: str
    weights: Tensor  # [M, H, S] float32, rows sum to 1


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """A private adapter laid out for the layers, on their device (`Planner.prepare`)."""

    key: str  # the adapter's fingerprint
    factors: Sequence[ops.Factors | None]  # by group
    table: FactorTable | None = None  # of the factors, where kernels read them
    hold: object = None  # goes with this object: what the memory is accounted by
    whole: PrivateAdapter | None = None  # where other processes need their parts of it, too

    @property
    def nbytes(self) -> int:
        own = nbytes_of(self.factors)
        return own if self.whole is None else own + self.whole.nbytes


def nbytes_of(factors: Sequence[ops.Factors | None]) -> int:
    """The memory of an adapter's factors."""
    return sum(own.nbytes for own in factors if own is not None)


Adapter = RoutedTask | PrivateAdapter | PreparedAdapter | None
"""What answers one row of a batch; None is the bare backbone."""

Tokens = slice | Tensor
"""Positions in the packed row of a step: a slice where they are adjacent."""


def adapter_key(adapter: Adapter) -> str:
    """Equal for adapters that compute the same function; empty for the bare backbone."""
    if adapter is None:
        return ""
    return adapter.fingerprint if isinstance(adapter, PrivateAdapter) else adapter.key


@dataclass(frozen=True, eq=False)
class FactoredPart:
    """The tokens that go through the factored form."""

    tokens: Tokens
    weights: Tensor  # [n, H, M*S*r] float32, or [n, M, H, S] where kernels serve;
    # zero rows leave a token bare
    pieces: ops.Pieces  # which rows of the weights belong to which of these tokens


@dataclass(frozen=True, eq=False)
class CombinedPart:
    """The tokens of one task that go through the combined form: its factors by group."""

    tokens: Tokens
    factors: Sequence[ops.Factors | None]


class Step(Protocol):
    """A plan's parts as kernels take them: the same two halves for both forms together."""

    def reads(self, x: Tensor, y: Tensor) -> bool:
        """Whether the kernels take these: their dtype, and how they lie in memory."""

    def shrink(
        self, group: ops.SkillGroup, index: int, first: int, x: Tensor
    ) -> tuple[Any | None, Any | None]:
        """x `[N, I]`, contiguous; the group's number and that of its first module."""

    def expand(self, group: ops.SkillGroup, first: int, g: int, hidden: Any, y: Tensor, /) -> None:
        """Adds module g's delta onto y `[N, O]`, given what `shrink` answered."""


@dataclass(eq=False)
class Plan:
    """Built once per step, read by every routed layer of the forward pass."""

    tokens: int
    factored: FactoredPart | None
    combined: Sequence[CombinedPart]
    step: Step | None = None  # the same parts, where kernels serve them
    forms: Mapping[str, int] = field(default_factory=dict)  # tasks by the form chosen for them
    stale: bool = False  # set when a later plan takes over the buffer of this one's weights
    _memo: "tuple[GroupSlot, Tensor, Any] | None" = field(default=None, repr=False)

    def add_delta(self, slot: "GroupSlot", g: int, x: Tensor, y: Tensor) -> None:
        """Add the adapters' part of module g of a group to its base product y, in place.

        x `[..., I]` and y `[..., O]` with as many tokens as the plan has. Raises `PlanError` when
        they have another number, or when the planner has built a later plan since.
        """
        if self.stale:
            raise PlanError("a later plan has overwritten this one's weights")
        flat_y = y.view(-1, y.shape[-1])
        if flat_y.shape[0] != self.tokens:
            raise PlanError(
                "the forward pass has another number of tokens than its plan",
                found=str(flat_y.shape[0]),
                expected=str(self.tokens),
            )
        if self.step is not None and _no_gradients(x, y) and self.step.reads(x, y):
            self._add_by_kernels(self.step, slot, g, x, flat_y)
            return
        hidden = self._hidden(slot, x)
        if self.factored is not None and hidden[0] is not None:
            self._expand_factored(self.factored, slot, g, hidden[0], flat_y)
        for part, low_rank in zip(self.combined, hidden[1:], strict=True):
            factors = part.factors[slot.index]
            if factors is not None and low_rank is not None:
                _expand_combined(part.tokens, factors, g, low_rank, flat_y)

    def _add_by_kernels(self, step: Step, slot: "GroupSlot", g: int, x: Tensor, y: Tensor) -> None:
        hidden = self._remembered(slot, x)
        if not isinstance(hidden, tuple):
            flat = x.reshape(-1, x.shape[-1]).contiguous()
            hidden = step.shrink(slot.group, slot.index, slot.first, flat)
            self._memo = (slot, x, hidden)
        step.expand(slot.group, slot.first, g, hidden, y)

    def _remembered(self, slot: "GroupSlot", x: Tensor) -> Any:
        """What was shrunk for the group: its modules come in turn with the very same tensor."""
        memo = self._memo
        return memo[2] if memo is not None and memo[0] is slot and memo[1] is x else None

    def _hidden(self, slot: "GroupSlot", x: Tensor) -> list[Tensor | None]:
        remembered = self._remembered(slot, x)
        if isinstance(remembered, list):
            return remembered
        flat = x.reshape(-1, x.shape[-1]).to(slot.group.a.dtype)
        hidden: list[Tensor | None] = [None]
        if self.factored is not None:
            part = self.factored
            weights, own = self._spread(part, slot), flat[part.tokens]
            hidden[0] = ops.factored_shrink(own, slot.group, weights, part.pieces)
        for task in self.combined:
            factors = task.factors[slot.index]
            shrunk = None if factors is None else ops.combined_shrink(flat[task.tokens], factors)
            hidden.append(shrunk)
        self._memo = (slot, x, hidden)
        return hidden

    def _spread(self, part: FactoredPart, slot: "GroupSlot") -> Tensor:
        if self.step is None:
            return part.weights[:, :, slot.columns]
        own = part.weights[:, slot.first : slot.first + slot.group.size]
        return ops.spread(own, slot.group.rank)

    @staticmethod
    def _expand_factored(
        part: FactoredPart, slot: "GroupSlot", g: int, hidden: Tensor, y: Tensor
    ) -> None:
        if isinstance(part.tokens, slice):
            ops.factored_expand(y[part.tokens], hidden, slot.group, g)
            return
        own = y[part.tokens]
        ops.factored_expand(own, hidden, slot.group, g)
        y[part.tokens] = own


def _no_gradients(x: Tensor, y: Tensor) -> bool:
    """The kernels have none."""
    return not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))


def _expand_combined(
    tokens: Tokens, factors: ops.Factors, g: int, hidden: Tensor, y: Tensor
) -> None:
    if isinstance(tokens, slice):
        ops.combined_expand(y[tokens], hidden, factors, g)
        return
    own = y[tokens]
    ops.combined_expand(own, hidden, factors, g)
    y[tokens] = own


@dataclass(frozen=True, eq=False)
class GroupSlot:
    """A group's place among all groups of a backbone, and its columns in the spread weights."""

    index: int
    group: ops.SkillGroup
    columns: slice

    @property
    def first(self) -> int:
        """The number of the group's first module."""
        return int(self.columns.start) // self.group.columns


_active: ContextVar[Plan | None] = ContextVar("polyhead_plan", default=None)


def active_plan() -> Plan | None:
    """The plan of the forward pass that is running, or None: then every layer is bare."""
    return _active.get()


@contextmanager
def use_plan(plan: Plan) -> Iterator[Plan]:
    """Make `plan` the active one for the forward passes inside. Raises `PlanError` when nested."""
    if _active.get() is not None:
        raise PlanError("a plan is already active; plans do not nest")
    token = _active.set(plan)
    try:
        yield plan
    finally:
        _active.reset(token)
