"""Skills, factors and steps for the kernels that multiply pairs of bfloat16 numbers.

A matrix to multiply by, `[k, n]`, lies in pairs of rows for them, `[k/2, n, 2]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.adapters import cpu_pair_kernels, ops
from polyhead.adapters.compiled import (
    CompiledCombined,
    CompiledFactored,
    CompiledStep,
    FactorTable,
    Hidden,
)
from polyhead.adapters.cpu_pair_tiles import LANES
from polyhead.adapters.inventory import InventoryHeader


def fits(header: InventoryHeader) -> bool:
    """Whether skills of these shapes have whole pairs and whole vectors in every head."""
    heads = header.heads
    return all(
        _fit(heads, header.skills * header.rank, module.in_features, [module.out_features])
        for module in header.modules
    )


def fit(group: ops.SkillGroup) -> bool:
    """The same of a group that is packed already, all its heads here."""
    widths = [group.heads * b.shape[2] for b in group.b]
    return _fit(group.heads, group.columns, group.heads * group.a.shape[1], widths)


def _fit(heads: int, columns: int, width: int, outputs: Sequence[int]) -> bool:
    whole = all(output % (LANES * heads) == 0 for output in outputs)
    return whole and width % (2 * heads) == 0 and columns % LANES == 0


def paired(matrix: Tensor) -> Tensor:
    """`[..., k, n]` to `[..., k/2, n, 2]`, k even."""
    *outer, rows, columns = matrix.shape
    pairs = matrix.to(torch.bfloat16).reshape(*outer, rows // 2, 2, columns)
    return pairs.transpose(-1, -2).contiguous()


def table(factors: Sequence[ops.Factors | None], sizes: Sequence[int]) -> FactorTable:
    """A task's factors, laid out in pairs.

    Ranks are padded with zeros: each module's to whole pairs, a group's sum to whole vectors.
    """
    padded = [None if own is None else _padded(own) for own in factors]
    return FactorTable.of(padded, sizes, paired)


def _padded(factors: ops.Factors) -> ops.Factors:
    ranks = [0 if b is None else b.shape[0] for b in factors.b]
    columns = [F.pad(a, (0, a.shape[1] % 2)) for a in torch.split(factors.a, ranks, 1)]
    a = torch.cat(columns, 1)
    b = tuple(None if b is None else F.pad(b, (0, 0, 0, b.shape[0] % 2)) for b in factors.b)
    return ops.Factors(F.pad(a, (0, -a.shape[1] % LANES)), b)


@dataclass(frozen=True, eq=False)
class PairedSkills:
    """A group's skills: a `[H, I/H/2, G*S*r, 2]`, b[g] `[H, S*r/2, O_g/H, 2]`."""

    a: Tensor
    b: tuple[Tensor, ...]

    @classmethod
    def of(cls, group: ops.SkillGroup) -> "PairedSkills":
        return cls(paired(group.a), tuple(paired(b) for b in group.b))


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
