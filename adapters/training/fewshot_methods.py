"""The four methods of a fit: what every learner starts from, trains, and ends up with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.factors import Source
from polyhead.adapters.training.fewshot_adam import Owned
from polyhead.adapters.training.fewshot_types import FitOptions, TrainedMethod
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import OwnSkillsSource, PrivateSource, RoutedSource, export

LOGITS_OVER_RATE = 100.0
"""How much faster logits learn than the skills beside them (the published configurations)."""

Snapshot = Mapping[str, Tensor]
"""One learner's part of every parameter, by the parameter's name."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of T learners that share a batch."""

    method: TrainedMethod
    inventory: Inventory
    source: Source
    owned: tuple[Owned, ...]

    def rate(self, owned: Owned, options: FitOptions) -> float:
        """The learning rate of one parameter under a task's options."""
        if owned.name != "logits":
            return options.rate
        return options.logits_rate if self.method == "z" else options.rate * LOGITS_OVER_RATE

    def begin(self, learner: int, logits: Tensor) -> None:
        """Let a learner begin from logits `[M, H, S]`, where it has any."""
        for one in self.owned:
            if one.name == "logits":
                one.restore(learner, logits)

    def snapshot(self, learner: int) -> Snapshot:
        return {one.name: one.slice(learner) for one in self.owned}

    def export(self, learner: int, state: Snapshot) -> Routing | PrivateAdapter:
        """What a task holds and serves once it is fitted. Overwrites the learner with `state`."""
        for one in self.owned:
            one.restore(learner, state[one.name])
        if isinstance(self.source, PrivateSource | OwnSkillsSource):
            return export(self.source, learner, self.inventory.header.scaling)
        return Routing.checked(state["logits"].cpu(), self.inventory.layout)


def start(
    method: TrainedMethod, inventory: Inventory, skills: SharedSkills, seeds: Sequence[int]
) -> Parameters:
    """Fresh learners, one for each seed. skills: the inventory's, frozen, shared between calls."""
    device = next(skills.parameters()).device
    source: RoutedSource | PrivateSource | OwnSkillsSource
    if method == "z":
        source = RoutedSource(skills, _routings(inventory, seeds).to(device))
        owned = [Owned("logits", source.routings.logits, 0)]
    elif method == "mhr":
        source = OwnSkillsSource(skills, _routings(inventory, seeds).to(device))
        owned = [Owned("logits", source.routings.logits, 0), *_owned(source.a, source.b)]
    else:
        source = _private(method, inventory, skills, seeds).to(device)
        owned = _owned(source.a, source.b)
    return Parameters(method, inventory, source, tuple(owned))


def trained_numbers(method: TrainedMethod, inventory: Inventory) -> int:
    """How many numbers one task trains."""
    header = inventory.header
    logits = len(header.modules) * header.heads * header.skills
    adapter = sum(header.rank * (m.in_features + m.out_features) for m in header.modules)
    sizes = {"z": logits, "mhr": logits + header.skills * adapter, "mu": adapter, "lora": adapter}
    return sizes[method]


def _routings(inventory: Inventory, seeds: Sequence[int]) -> Routings:
    """Logits drawn for each learner from its own seed, whatever stands beside it."""
    made = Routings(inventory.layout, len(seeds))
    for row, seed in enumerate(seeds):
        alone = Routings(inventory.layout, 1, generator=torch.Generator().manual_seed(seed))
        made.logits.data[row] = alone.logits.data[0]
    return made


def _private(
    method: TrainedMethod, inventory: Inventory, skills: SharedSkills, seeds: Sequence[int]
) -> PrivateSource:
    header = inventory.header
    if method == "lora":
        return PrivateSource.fresh(header.modules, header.rank, seeds)
    shape = (len(seeds), len(header.modules), header.heads, header.skills)
    device = next(skills.parameters()).device
    return PrivateSource.averaged(skills, torch.full(shape, 1 / header.skills, device=device))


def _owned(a: nn.ParameterDict, b: nn.ParameterDict) -> list[Owned]:
    return [
        Owned(f"{letter}{width}", parameter, 1)
        for letter, stacks in (("a", a), ("b", b))
        for width, parameter in stacks.items()
    ]
