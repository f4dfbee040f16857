"""A step as the compiled kernels take it: tables of addresses instead of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyhead.adapters import cpu_kernels, ops

MOST_THREADS = 2
"""The kernels use one thread: with more than these torch's own products are faster."""

READ = (torch.float32, torch.bfloat16)
"""Activations that the kernels take. They compute in float32, whatever the backbone does."""

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]
Hidden = tuple[Floats | None, Floats | None]
"""The low-rank activations of a group: factored `[n, G, r]`, combined `[N, R]`."""


def compiled_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve numbers of this kind."""
    plain = device.type == "cpu" and dtype == torch.float32
    return plain and torch.get_num_threads() <= MOST_THREADS


def skill_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the skills of a backbone are kept in: its own dtype, but float32 for bfloat16 where the
    kernels serve. They are small beside the backbone, and the kernels compute in nothing else."""
    widened = dtype == torch.bfloat16 and compiled_for(torch.float32, device)
    return torch.float32 if widened else dtype


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
            for b in own.b:
                rank = 0 if b is None else b.shape[0]
                modules.append((0 if b is None else b.data_ptr(), rank, column))
                column += rank
        return cls(np.array(groups, np.int64), np.array(modules, np.int64))


class CompiledCombined:
    """The tokens of the combined form, all tasks in one table."""

    def __init__(
        self, tokens: int, tables: Sequence[FactorTable], positions: Sequence[Sequence[int]]
    ) -> None:
        self._tokens = tokens
        self._groups = np.stack([table.groups for table in tables], -1)  # [groups, 2, T]
        self._modules = np.stack([table.modules for table in tables], -1)  # [M, 3, T]
        self._width = int(self._groups[:, 1].max(initial=0))
        runs = [(*run, task) for task, own in enumerate(positions) for run in _runs(own)]
        self._runs = np.array(runs, np.int64)  # [K, 3]: first token, tokens, task

    def shrink(self, group: int, x: Tensor) -> Floats:
        hidden = np.zeros((self._tokens, self._width), np.float32)
        a, ranks = self._groups[group]
        cpu_kernels.combined_shrink(x.data_ptr(), x.shape[1], a, ranks, self._runs, hidden)
        return hidden

    def expand(self, module: int, hidden: Floats, y: Tensor) -> None:
        b, ranks, offsets = self._modules[module]
        cpu_kernels.combined_expand(y.data_ptr(), y.shape[1], b, ranks, offsets, self._runs, hidden)


@dataclass(frozen=True, eq=False)
class CompiledFactored:
    """The tokens of the factored form. weights `[n, M, H, S]`, rows: each token's row of them."""

    tokens: slice | Tensor
    weights: Floats
    rows: Numbers

    @classmethod
    def of(cls, tokens: slice | Tensor, weights: Tensor, pieces: ops.Pieces) -> "CompiledFactored":
        return cls(tokens, weights.numpy(), rows_of(pieces))

    def shrink(self, group: ops.SkillGroup, first: int, x: Tensor) -> Floats:
        own = x[self.tokens]
        mixed = np.zeros((len(self.rows), group.size, group.rank), np.float32)
        cpu_kernels.factored_shrink(
            own.data_ptr(), own.shape[1], group.a.data_ptr(), self.weights, self.rows, first, mixed
        )
        return mixed

    def expand(self, group: ops.SkillGroup, first: int, g: int, mixed: Floats, y: Tensor) -> None:
        own = y[self.tokens]
        b, module = group.b[g].data_ptr(), first + g
        cpu_kernels.factored_expand(
            own.data_ptr(), own.shape[1], b, self.weights, self.rows, module, g, mixed
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
        x = x.float()
        mixed = None if self.factored is None else self.factored.shrink(group, first, x)
        return mixed, None if self.combined is None else self.combined.shrink(index, x)

    def expand(self, group: ops.SkillGroup, first: int, g: int, hidden: Hidden, y: Tensor) -> None:
        """Adds module g's delta onto y `[N, O]`, contiguous."""
        if y.dtype != torch.float32:
            delta = torch.zeros(y.shape)
            self.expand(group, first, g, hidden, delta)
            y += delta
            return
        mixed, low_rank = hidden
        if self.factored is not None and mixed is not None:
            self.factored.expand(group, first, g, mixed, y)
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
