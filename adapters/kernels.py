"""Which kernels serve a device and dtype, chosen in one place; the torch forms serve the rest."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from polyhead.adapters.compiled import (
    CompiledCombined,
    CompiledFactored,
    CompiledStep,
    FactorTable,
    compiled_for,
)
from polyhead.adapters.cpu_pair_tiles import LANES
from polyhead.adapters.ops import Factors, SkillGroup, fold_factors
from polyhead.adapters.pairs import (
    PairedCombined,
    PairedFactored,
    PairedFactors,
    PairedSkills,
    PairedStep,
    group_suits,
)
from polyhead.adapters.plan import Plan, Step

Tables = Sequence[FactorTable]
Positions = Sequence[Sequence[int]]


class Kernels(Protocol):
    """Turns the parts of a plan into a step."""

    def fold(self, index: int, group: SkillGroup, weights: Tensor, /) -> Factors:
        """One task's factors of a group by its number; weights `[G, H, S]`."""

    def lay(self, factors: Factors, /) -> Factors:
        """Factors made elsewhere, in the order in which the kernels read them."""

    def step(
        self, plan: Plan, tables: Tables, positions: Positions, device: torch.device, /
    ) -> Step:
        """tables and positions: of every task of the combined form, its factors and its tokens."""


def kernels_for(
    dtype: torch.dtype, device: torch.device, groups: Sequence[SkillGroup]
) -> Kernels | None:
    """Those for skills of this dtype, on this device; None where the torch forms serve."""
    if compiled_for(dtype, device):
        if dtype == torch.float32:
            return CompiledKernels()
        if all(group_suits(group) for group in groups):
            return PairedKernels(groups)
    if device.type == "cuda" and find_spec("triton") is not None:
        return TritonKernels(dtype)
    return None


class CompiledKernels:
    """For float32 on the CPU."""

    def fold(self, _: int, group: SkillGroup, weights: Tensor) -> Factors:
        return fold_factors(group, weights)

    def lay(self, factors: Factors) -> Factors:
        return factors

    def step(self, plan: Plan, tables: Tables, positions: Positions, _: torch.device) -> Step:
        part = plan.factored
        factored = None
        if part is not None:
            factored = CompiledFactored.of(part.tokens, part.weights, part.pieces)
        combined = CompiledCombined(plan.tokens, tables, positions) if tables else None
        return CompiledStep(factored, combined)


class PairedKernels:
    """For bfloat16 on CPUs that multiply pairs of it."""

    def __init__(self, groups: Sequence[SkillGroup]) -> None:
        self._skills = [PairedSkills.of(group) for group in groups]

    def fold(self, index: int, group: SkillGroup, weights: Tensor) -> Factors:
        if 2 * group.rank % LANES:
            return self.lay(fold_factors(group, weights))
        return self._skills[index].fold(weights, group.rank)

    def lay(self, factors: Factors) -> Factors:
        return PairedFactors.of(factors)

    def step(self, plan: Plan, tables: Tables, positions: Positions, _: torch.device) -> Step:
        part = plan.factored
        factored = None
        if part is not None:
            factored = PairedFactored.of(part.tokens, part.weights, part.pieces)
        combined = PairedCombined(plan.tokens, tables, positions) if tables else None
        return PairedStep(factored, combined, self._skills)


class TritonKernels:
    """For CUDA, and for the CPU where Triton's interpreter is on (`TRITON_INTERPRET=1`).

    dtype: of the backbone, its skills and factors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        # Imported here, since whoever serves on a CPU need not have Triton.
        from polyhead.adapters import triton_step

        self._kernels, self._dtype = triton_step, dtype

    def fold(self, _: int, group: SkillGroup, weights: Tensor) -> Factors:
        return fold_factors(group, weights)

    def lay(self, factors: Factors) -> Factors:
        return factors

    def step(self, plan: Plan, tables: Tables, positions: Positions, device: torch.device) -> Step:
        part, of = plan.factored, self._kernels
        factored = combined = None
        if part is not None:
            factored = of.TritonFactored.of(part.tokens, part.weights, part.pieces)
        if tables:
            combined = of.TritonCombined(tables, positions, device)
        step: Step = of.TritonStep(self._dtype, factored, combined)
        return step
