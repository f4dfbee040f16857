"""A step as the compiled kernels take it: tables of addresses instead of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyhead.adapters import cpu_kernels, ops
from polyhead.adapters.cpu_pair_tiles import pairs_supported

MOST_THREADS = 2
"""The kernels use one thread: with more than these torch's own products are faster."""

READ = (torch.float32, torch.bfloat16)
"""Activations that the kernels take. They compute in float32, whatever the backbone does."""

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]
Hidden = tuple[Any | None, Any | None]
"""The low-rank activations of a group: factored `[n, G, r]`, combined `[N, R]`."""


def compiled_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve numbers of this kind, bfloat16 in shapes that suit them."""
    served = dtype == torch.float32 or (dtype == torch.bfloat16 and pairs_supported())
    return served and device.type == "cpu" and torch.get_num_threads() <= MOST_THREADS


def skill_dtype(dtype: torch.dtype, device: torch.device, in_pairs: bool) -> torch.dtype:
    """What the skills of a backbone are kept in: its own dtype, but float32 for bfloat16 where only
    the kernels of float32 serve. Skills are small beside the backbone.

    in_pairs: whether their shapes suit the kernels of bfloat16 (`pairs.header_suits`).
    """
    if dtype != torch.bfloat16 or (in_pairs and compiled_for(dtype, device)):
        return dtype
    return torch.float32 if compiled_for(torch.float32, device) else dtype


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Where one task's factors lie. It is good while those live."""

    groups: Numbers  # [groups, 2]: address of A_t, sum of its ranks
    modules: Numbers  # [M, 3]: address of B_t, rank, first column in the group

    @classmethod
    def of(cls, factors: Sequence[ops.Factors | None], sizes: Sequence[int]) -> "FactorTable":
        groups, modules = [], []
        for own, size in zip(factors, sizes, strict=True):
            if own is None:
                groups.append((0, 0))
                modules += [(0, 0, 0)] * size
                continue
            groups.append((own.a.data_ptr(), own.a.shape[1]))
            column = 0
            for b, rank in zip(own.b, own.ranks, strict=True):
                modules.append((0 if b is None else b.data_ptr(), rank, column))
                column += rank
        return cls(np.array(groups, np.int64), np.array(modules, np.int64))


class CompiledCombined:
    """The tokens of the combined form, all tasks in one table."""

    kernels: ClassVar[Any] = cpu_kernels
    number: ClassVar[type[np.generic]] = np.float32  # of the low-rank activations

    def __init__(
        self, tokens: int, tables: Sequence[FactorTable], positions: Sequence[Sequence[int]]
    ) -> None:
        self._tokens = tokens
        self._groups = np.stack([table.groups for table in tables], -1)  # [groups, 2, T]
        self._modules = np.stack([table.modules for table in tables], -1)  # [M, 3, T]
        self._width = int(self._groups[:, 1].max(initial=0))
        runs = [(*run, task) for task, own in enumerate(positions) for run in _runs(own)]
        self._runs = np.array(runs, np.int64)  # [K, 3]: first token, tokens, task

    def shrink(self, group: int, x: Tensor) -> NDArray[Any]:
        hidden = np.zeros((self._tokens, self._width), self.number)
        a, ranks = self._groups[group]
        self.kernels.combined_shrink(x.data_ptr(), x.shape[1], a, ranks, self._runs, hidden)
        return hidden

    def expand(self, module: int, hidden: NDArray[Any], y: Tensor) -> None:
        b, ranks, offsets = self._modules[module]
        address, width = y.data_ptr(), y.shape[1]
        self.kernels.combined_expand(address, width, b, ranks, offsets, self._runs, hidden)


@dataclass(frozen=True, eq=False)
class CompiledFactored:
    """The tokens of the factored form. weights `[n, M, H, S]`, rows: each token's row of them."""

    tokens: slice | Tensor
    weights: Floats
    rows: Numbers
    kernels: ClassVar[Any] = cpu_kernels

    @classmethod
    def of(cls, tokens: slice | Tensor, weights: Tensor, pieces: ops.Pieces) -> Self:
        return cls(tokens, weights.numpy(), rows_of(pieces))

    def shrink(self, a: Tensor, size: int, rank: int, first: int, x: Tensor) -> Floats:
        """a: the skills of a group of so many modules, whose first has that number."""
        own = x[self.tokens]
        mixed = np.zeros((len(self.rows), size, rank), np.float32)
        self.kernels.factored_shrink(
            own.data_ptr(), own.shape[1], a.data_ptr(), self.weights, self.rows, first, mixed
        )
        return mixed

    def expand(self, b: Tensor, module: int, g: int, mixed: Floats, y: Tensor) -> None:
        """b: the skills of a module, the g-th of its group."""
        own = y[self.tokens]
        address, width = own.data_ptr(), own.shape[1]
        self.kernels.factored_expand(
            address, width, b.data_ptr(), self.weights, self.rows, module, g, mixed
        )
        if isinstance(self.tokens, Tensor):
            y[self.tokens] = own


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """What `Plan` hands its work to where the kernels serve: the same two halves."""

    factored: CompiledFactored | None
    combined: CompiledCombined | None

    def reads(self, x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype and x.dtype in READ and y.is_contiguous()

    def shrink(self, group: ops.SkillGroup, index: int, first: int, x: Tensor) -> Hidden:
        """x `[N, I]` contiguous; the group's number and that of its first module."""
        x, part = x.float(), self.factored
        mixed = None if part is None else part.shrink(group.a, group.size, group.rank, first, x)
        return mixed, None if self.combined is None else self.combined.shrink(index, x)

    def expand(
        self, group: ops.SkillGroup, first: int, g: int, hidden: Hidden, y: Tensor, /
    ) -> None:
        """Adds module g's delta onto y `[N, O]`, contiguous."""
        if y.dtype != torch.float32:
            delta = torch.zeros(y.shape)
            self.expand(group, first, g, hidden, delta)
            y += delta
            return
        mixed, low_rank = hidden
        if self.factored is not None and mixed is not None:
            self.factored.expand(group.b[g], first + g, g, mixed, y)
        if self.combined is not None and low_rank is not None:
            self.combined.expand(first + g, low_rank, y)


def rows_of(pieces: ops.Pieces) -> Numbers:
    """Each token's row of the weights."""
    rows = np.empty(pieces[-1][0].stop, np.int64)
    for own, found in pieces:
        rows[own] = np.arange(found.start, found.stop)  # one row serves all of its tokens
    return rows


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent positions as (first, how many)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and sum(runs[-1]) == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs
