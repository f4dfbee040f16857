"""Which exact form a step should use for which task: a cost model measured on the device."""

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.adapters import ops


@dataclass(frozen=True)
class FormCosts:
    """Seconds of one forward pass over all modules. The defaults are in arbitrary units whose
    ratios suit a small backbone; `measure_costs` replaces them by figures of this machine."""

    factored_step: float = 8.0  # once, if any token is factored
    factored_token: float = 1.0  # for each factored token
    combined_task: float = 4.0  # for each combined task
    combined_token: float = 0.15  # for each combined token
    fold: float = 15.0  # to build a task's factors when they are not resident

    def choose_combined(self, tokens: Mapping[str, int], available: Set[str]) -> set[str]:
        """The tasks that are cheaper in the combined form.

        tokens: tokens of each routed task in the step; available: tasks whose factors exist, or
        are to be built now whatever that costs.
        """
        better = {key for key in tokens.keys() & available if self.saving(tokens[key]) > 0}
        rest = tokens.keys() - better
        if rest and rest <= available:
            lost = -sum(self.saving(tokens[key]) for key in rest)
            if lost < self.factored_step:
                return set(tokens)  # with nothing left to factor, its fixed cost goes too
        return better

    def saving(self, tokens: int) -> float:
        """What one task saves in a step by the combined form, if others are factored anyway."""
        combined = self.combined_task + tokens * self.combined_token
        return tokens * self.factored_token - combined


class RentOrBuy:
    """When to build a task's factors: once they would have saved what building them costs.

    The rule of the ski-rental problem: whatever comes, it pays at most twice the best cost.
    """

    def __init__(self, most: int = 4096) -> None:
        self._missed: dict[str, float] = {}
        self._most = most

    def due(self, costs: FormCosts, tokens: Mapping[str, int], resident: Set[str]) -> set[str]:
        """Note what this step misses without the factors; answers whom to build for now.

        That is one task at most, so that no step is held up by more than one building.
        """
        ideal = costs.choose_combined(tokens, tokens.keys())
        missing = [key for key in tokens if key in ideal and key not in resident]
        everything = len(ideal) == len(tokens)
        share = costs.factored_step / len(missing) if everything and missing else 0.0
        for key in missing:
            missed = self._missed.pop(key, 0.0) + costs.saving(tokens[key]) + share
            self._missed[key] = missed
            if missed >= costs.fold:
                del self._missed[key]
                return {key}
        while len(self._missed) > self._most:
            del self._missed[next(iter(self._missed))]
        return set()


FEW, MANY, REPEATS = 1, 32, 5
"""Tokens of the two measured batches, and how often each is timed."""


@torch.inference_mode()
def measure_costs(groups: Sequence[ops.SkillGroup]) -> FormCosts:
    """Time both forms over all modules on the device that holds the skills.

    Takes well under a second for a small backbone; the least of a few runs counts, since
    whatever else the machine does only ever adds.
    """
    device = groups[0].a.device
    outputs = [_Outputs.of(group, MANY) for group in groups]

    def factored(tokens: int) -> Callable[[], None]:
        return lambda: _each(outputs, lambda out: out.factored(tokens))

    def combined(tokens: int) -> Callable[[], None]:
        return lambda: _each(outputs, lambda out: out.combined(tokens))

    few, many = _seconds(factored(FEW), device), _seconds(factored(MANY), device)
    own_few, own_many = _seconds(combined(FEW), device), _seconds(combined(MANY), device)
    factored_token = max(many - few, 0.0) / (MANY - FEW)
    combined_token = max(own_many - own_few, 0.0) / (MANY - FEW)
    return FormCosts(
        factored_step=few - FEW * factored_token,
        factored_token=factored_token,
        combined_task=own_few - FEW * combined_token,
        combined_token=combined_token,
        fold=_seconds(lambda: _each(outputs, lambda out: out.fold()), device),
    )


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What one group needs to be timed."""

    group: ops.SkillGroup
    x: Tensor  # [n, I]
    y: list[Tensor]  # [n, O_g]
    weights: Tensor  # [G, H, S]
    spread: Tensor  # [n, H, G*S*r]
    factors: ops.Factors

    @classmethod
    def of(cls, group: ops.SkillGroup, tokens: int) -> "_Outputs":
        like = group.a
        shape = (group.size, group.heads, group.skills)
        weights = torch.full(shape, 1 / group.skills, device=like.device)
        spread = ops.spread(weights, group.rank).repeat(tokens, 1, 1)
        x = like.new_ones(tokens, group.heads * like.shape[1])
        y = [like.new_zeros(tokens, group.heads * b.shape[2]) for b in group.b]
        return cls(group, x, y, weights, spread, ops.fold_factors(group, weights))

    def factored(self, tokens: int) -> None:
        everything = [(slice(0, tokens), slice(0, tokens))]
        hidden = ops.factored_shrink(self.x[:tokens], self.group, self.spread[:tokens], everything)
        for g, y in enumerate(self.y):
            ops.factored_expand(y[:tokens], hidden, self.group, g)

    def combined(self, tokens: int) -> None:
        hidden = ops.combined_shrink(self.x[:tokens], self.factors)
        for g, y in enumerate(self.y):
            ops.combined_expand(y[:tokens], hidden, self.factors, g)

    def fold(self) -> None:
        ops.fold_factors(self.group, self.weights)


def _each(outputs: Sequence[_Outputs], run: Callable[[_Outputs], None]) -> None:
    for output in outputs:
        run(output)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    least = float("inf")
    for _ in range(REPEATS):
        _settle(device)
        started = time.perf_counter()
        run()
        _settle(device)
        least = min(least, time.perf_counter() - started)
    return least


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
