"""What each pre-training method trains, and the inventory that comes of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from polyhead.adapters.inject import find_modules
from polyhead.adapters.inventory import (
    DTYPES,
    BackboneRef,
    Inventory,
    InventoryHeader,
    ModuleShape,
)
from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.config import TrainingConfig
from polyhead.adapters.training.errors import ConfigError
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import RoutedSource

UNROUTED = ("lora", "mu-zero-shot")
"""Methods whose tasks all use every skill alike, so that there are no logits to train."""


class Plan:
    """What is trained: modules, shared skills and the routings of the tasks, in their order."""

    def __init__(
        self, config: TrainingConfig, model: PreTrainedModel, backbone: str, tasks: Sequence[str]
    ) -> None:
        """Raises `InjectionError`, `InventoryError` or `BackboneMismatch`."""
        self.config = config
        self.tasks = tuple(tasks)
        self.backbone = BackboneRef.of(model, backbone)
        self.start: str | None = None  # fingerprint of the inventory that it starts from
        inventory = self._inventory()
        self.header, skills = self._fresh(model) if inventory is None else _taken(inventory)
        layout = Layout(
            tuple(m.name for m in self.header.modules), self.header.heads, self.header.skills
        )
        routings = Routings(
            layout,
            len(tasks),
            granularity=config.skills.granularity,
            relaxed=config.skills.relaxed,
            uniform=config.method in UNROUTED,
            generator=torch.Generator().manual_seed(config.seed + 1),
        )
        if inventory is not None and config.method not in UNROUTED:
            self._take_routings(routings, inventory)
        self.layout = layout
        self.source = RoutedSource(skills, routings)

    def begin(self, step: int, drawn: Sequence[tuple[int, Encoded]]) -> None:
        """Called before each step with what it learns from; the same on every process."""

    @property
    def modules(self) -> tuple[ModuleShape, ...]:
        """The adapted layers."""
        return self.header.modules

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained: what methods are to be compared at."""
        return sum(p.numel() for p in self.source.parameters() if p.requires_grad)

    def optimiser(self) -> torch.optim.AdamW:
        """Two groups: the skills, then the logits with their own rate and no decay."""
        options = self.config.optimiser
        skills = {
            "params": list(self.source.skills.parameters()),
            "lr": options.rate,
            "weight_decay": options.weight_decay,
        }
        logits = {
            "params": [self.source.routings.logits],
            "lr": self.config.logits_rate,
            "weight_decay": 0.0,
        }
        groups = [skills] if self.source.routings.uniform else [skills, logits]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def inventory(self, provenance: Mapping[str, Any]) -> Inventory:
        """The skills as they are now, with the tasks' routings."""
        a, b = self.source.skills.export()
        data = self.config.data
        name = self.config.skills.dtype
        dtype = DTYPES[name]
        header = self.header.model_copy(update={"dtype": name, "provenance": dict(provenance)})
        return Inventory(
            header,
            {module: tensor.to(dtype) for module, tensor in a.items()},
            {module: tensor.to(dtype) for module, tensor in b.items()},
            {task: self._routing(number) for number, task in enumerate(self.tasks)},
            {task: data.templates.get(task, data.template) for task in self.tasks},
        )

    def _routing(self, number: int) -> Routing:
        if self.source.routings.uniform:
            return Routing.uniform(self.layout)
        granularity = self.config.skills.granularity
        values = self.source.routings.logits[number].detach().float().cpu()
        values = values[0] if granularity == "model" else values
        return Routing.checked(values, self.layout, granularity=granularity)

    def _inventory(self) -> Inventory | None:
        """What the run starts from. Raises `ConfigError` where the file asks for other skills."""
        config = self.config
        if config.start is None:
            return None
        inventory = Inventory.load(config.start)
        inventory.check_backbone(self.backbone)
        for name in sorted(config.skills.model_fields_set & {"heads", "skills", "rank", "scaling"}):
            wanted, has = getattr(config.skills, name), getattr(inventory.header, name)
            if wanted != has:
                raise ConfigError(
                    f"the inventory to start from has {has}",
                    field=f"skills.{name}",
                    found=str(wanted),
                )
        self.start = inventory.fingerprint
        return inventory

    def _take_routings(self, routings: Routings, inventory: Inventory) -> None:
        """Tasks that the inventory knows go on from their logits, the others start near 0."""
        for number, task in enumerate(self.tasks):
            known = inventory.tasks.get(task)
            if known is None or known.kind != "logits":
                continue
            if known.granularity != routings.granularity:
                raise ConfigError(
                    f"the routings of the inventory to start from are by {known.granularity}",
                    field="skills.granularity",
                    found=routings.granularity,
                )
            with torch.no_grad():
                routings.logits[number] = known.values

    def _fresh(self, model: PreTrainedModel) -> tuple[InventoryHeader, SharedSkills]:
        shape = self.config.skills
        targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
        modules = find_modules(model, targets, shape.heads)
        header = InventoryHeader(
            backbone=self.backbone,
            modules=tuple(modules),
            heads=shape.heads,
            skills=shape.skills,
            rank=shape.rank,
            scaling=shape.scaling,
        )
        generator = torch.Generator().manual_seed(self.config.seed)
        sizes = (shape.heads, shape.skills, shape.rank)
        return header, SharedSkills.fresh(modules, *sizes, generator)


def _taken(inventory: Inventory) -> tuple[InventoryHeader, SharedSkills]:
    return inventory.header, SharedSkills.of(inventory)
