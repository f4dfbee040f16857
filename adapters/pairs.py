"""Skills, factors and steps for the kernels that multiply pairs of bfloat16 numbers.

A matrix to multiply by, `[k, n]`, lies in pairs of rows for them, `[k/2, n, 2]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from polyhead.adapters import cpu_pair_kernels, ops
from polyhead.adapters.compiled import (
    CompiledCombined,
    CompiledFactored,
    CompiledStep,
    Hidden,
)
from polyhead.adapters.cpu_pair_tiles import LANES
from polyhead.adapters.inventory import InventoryHeader


def header_suits(header: InventoryHeader) -> bool:
    """Whether skills of these shapes have whole pairs and whole vectors in every head."""
    heads = header.heads
    return all(
        _suits(heads, header.skills * header.rank, module.in_features, [module.out_features])
        for module in header.modules
    )


def group_suits(group: ops.SkillGroup) -> bool:
    """The same of a group that is packed already, all its heads here."""
    widths = [group.heads * b.shape[2] for b in group.b]
    return _suits(group.heads, group.columns, group.heads * group.a.shape[1], widths)


def _suits(heads: int, columns: int, width: int, outputs: Sequence[int]) -> bool:
    whole = all(output % (LANES * heads) == 0 for output in outputs)
    return whole and width % (2 * heads) == 0 and columns % LANES == 0


def paired(matrix: Tensor) -> Tensor:
    """`[..., k, n]` to `[..., k/2, n, 2]`, k even."""
    *outer, rows, columns = matrix.shape
    pairs = matrix.to(torch.bfloat16).reshape(*outer, rows // 2, 2, columns)
    return pairs.transpose(-1, -2).contiguous()


@dataclass(frozen=True, eq=False)
class PairedFactors(ops.Factors):
    """A task's factors in pairs of rows: a `[I/2, R, 2]`, b[g] `[r_g/2, O_g, 2]` or None.

    Ranks are padded with zeros: each module's to whole pairs, their sum R to whole vectors.
    """

    @classmethod
    def of(cls, factors: ops.Factors) -> "PairedFactors":
        # Written in place, module by module: an adapter has hundreds of small matrices, and each
        # operation on one waits for the interpreter's lock, which the engine's thread wants too.
        padded = [rank + rank % 2 for rank in factors.ranks]
        width = sum(padded)
        rows = factors.a.shape[0] // 2
        a = torch.zeros(rows, width + -width % LANES, 2, dtype=torch.bfloat16)
        column = 0
        for own, rank in zip(torch.split(factors.a, factors.ranks, 1), padded, strict=True):
            place = a[:, column : column + own.shape[1]]
            place.copy_(own.reshape(rows, 2, -1).transpose(1, 2))
            column += rank
        return cls(a, tuple(None if own is None else _even(own) for own in factors.b))

    @property
    def ranks(self) -> list[int]:
        return [0 if b is None else 2 * b.shape[0] for b in self.b]

    def plain(self) -> ops.Factors:
        b = tuple(None if own is None else _unpaired(own) for own in self.b)
        return ops.Factors(_unpaired(self.a)[:, : sum(self.ranks)].contiguous(), b)


def _even(b: Tensor) -> Tensor:
    """`[r, O]` in pairs of rows, the last one with zeros where r is odd."""
    return paired(F.pad(b, (0, 0, 0, 1)) if b.shape[0] % 2 else b)


def _unpaired(pairs: Tensor) -> Tensor:
    return pairs.transpose(1, 2).flatten(0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class PairedSkills:
    """A group's skills: a `[H, I/H/2, G*S*r, 2]`, b[g] `[H, S*r/2, O_g/H, 2]`."""

    a: Tensor
    b: tuple[Tensor, ...]

    @classmethod
    def of(cls, group: ops.SkillGroup) -> "PairedSkills":
        return cls(paired(group.a), tuple(paired(b) for b in group.b))

    def fold(self, weights: Tensor, rank: int) -> PairedFactors:
        """Average them for one task, in float32; weights `[G, H, S]`, 2 * rank in
        whole vectors."""
        w = weights.float().contiguous().numpy()
        size, heads, skills = w.shape
        columns = size * rank + -size * rank % LANES
        a = torch.empty(heads * self.a.shape[1], columns, 2, dtype=torch.bfloat16)
        cpu_pair_kernels.fold_a(_bits(self.a.flatten(2)), w, _bits(a.flatten(1)), rank)
        b = []
        for g, own in enumerate(self.b):
            outer = own.shape[2]
            folded = torch.empty(rank // 2, heads, 2 * outer, dtype=torch.bfloat16)
            by_skill = own.view(heads, skills, rank // 2, 2 * outer)
            cpu_pair_kernels.fold_b(_bits(by_skill), w[g], _bits(folded))
            b.append(folded.view(rank // 2, heads * outer, 2))
        return PairedFactors(a, tuple(b))


def _bits(tensor: Tensor) -> NDArray[np.uint16]:
    """The same memory as integers, for numpy has no bfloat16."""
    found: NDArray[np.uint16] = tensor.view(torch.uint16).numpy()
    return found


class PairedCombined(CompiledCombined):
    kernels: ClassVar = cpu_pair_kernels
    number: ClassVar = np.uint16  # holds a bfloat16


class PairedFactored(CompiledFactored):
    kernels: ClassVar = cpu_pair_kernels


@dataclass(frozen=True, eq=False)
class PairedStep(CompiledStep):
    """Reads and writes bfloat16 as it is, skills by the group's number."""

    skills: Sequence[PairedSkills] = ()

    def reads(self, x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype == torch.bfloat16 and y.is_contiguous()

    def shrink(self, group: ops.SkillGroup, index: int, first: int, x: Tensor) -> Hidden:
        part, a = self.factored, self.skills[index].a
        mixed = None if part is None else part.shrink(a, group.size, group.rank, first, x)
        low_rank = None if self.combined is None else self.combined.shrink(index, x)
        return None if mixed is None else (self.skills[index].b, mixed), low_rank

    def expand(self, _: ops.SkillGroup, first: int, g: int, hidden: Hidden, y: Tensor) -> None:
        shared, low_rank = hidden
        if self.factored is not None and shared is not None:
            b, mixed = shared
            self.factored.expand(b[g], first + g, g, mixed, y)
        if self.combined is not None and low_rank is not None:
            self.combined.expand(first + g, low_rank, y)
