"""Putting an inventory into a transformers model, and taking it out again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.compiled import skill_dtype
from polyhead.adapters.costs import FormCosts
from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inventory import Inventory, ModuleShape
from polyhead.adapters.kernels import Kernels
from polyhead.adapters.layers import RoutedLinear
from polyhead.adapters.ops import SkillGroup
from polyhead.adapters.pairs import header_suits
from polyhead.adapters.plan import Adapter, GroupSlot, Plan
from polyhead.adapters.planner import Planner
from polyhead.adapters.sharding import HeadParts

ALL_LINEAR = "all-linear"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(I, O)` of a layer that can be adapted, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def find_modules(
    model: PreTrainedModel, targets: str | Sequence[str] = ALL_LINEAR, heads: int = 1
) -> list[ModuleShape]:
    """The layers to adapt, in the model's own order.

    targets: "all-linear" (every linear layer but the output head) or the last parts of module
    names, such as `["q_proj", "v_proj"]`. Raises `InjectionError` when a target matches nothing
    or a layer's features cannot be split into `heads`.
    """
    output_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found, matched = [], set()
    for name, module in model.named_modules():
        shape = linear_shape(module)
        suffix = _matching_target(name, targets)
        if shape is None or suffix is None or module is output_head:
            continue
        matched.add(suffix)
        found.append(ModuleShape(name=name, in_features=shape[0], out_features=shape[1]))
    missing = [] if isinstance(targets, str) else sorted(set(targets) - matched)
    if missing or not found:
        raise InjectionError(
            "no linear layer has such a name", field="targets", found=str(missing or targets)
        )
    for module_shape in found:
        _check_heads(module_shape, heads)
    return found


def _matching_target(name: str, targets: str | Sequence[str]) -> str | None:
    if isinstance(targets, str):
        return targets if targets == ALL_LINEAR or _ends_with(name, targets) else None
    return next((target for target in targets if _ends_with(name, target)), None)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _check_heads(module: ModuleShape, heads: int) -> None:
    for width in (module.in_features, module.out_features):
        if heads < 1 or width % heads:
            raise InjectionError(
                "features cannot be split into heads",
                field=module.name,
                found=f"{width} features",
                expected=f"a multiple of {heads} heads",
            )


class Injection:
    """An inventory inside a model. `remove` restores the model, bit-identical."""

    def __init__(
        self,
        model: PreTrainedModel,
        inventory: Inventory,
        costs: FormCosts | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.inventory = inventory
        self._model = model
        self._originals = _find_layers(model, inventory)
        parts = {n: HeadParts.of(m, inventory.header.heads) for n, m in self._originals.items()}
        groups = _shared_inputs(model, self._originals)
        weight = next(model.parameters())
        dtype = skill_dtype(weight.dtype, weight.device, header_suits(inventory.header))
        self.slots = _pack_groups(inventory, groups, parts, weight.device, dtype)
        order = {module.name: i for i, module in enumerate(inventory.header.modules)}
        flat = [order[name] for names in groups for name in names]
        self.planner = Planner(
            self.slots, groups, flat, weight.device, costs=costs, kernels=kernels
        )
        for slot, names in zip(self.slots, groups, strict=True):
            for position, name in enumerate(names):
                layer = RoutedLinear(self._originals[name], slot, position)
                layer.train(model.training)
                model.set_submodule(name, layer)

    @property
    def count(self) -> int:
        """Layers that were touched."""
        return len(self._originals)

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int]) -> list[int]:
        """The order of the rows that makes `plan` cheapest."""
        return self.planner.arrange(adapters, counts)

    def plan(self, adapters: Sequence[Adapter], counts: Sequence[int]) -> Plan:
        """The plan for a packed row: `counts[i]` adjacent tokens answered by `adapters[i]`."""
        return self.planner.build(adapters, counts)

    def remove(self) -> None:
        """Put the original layers back."""
        for name, module in self._originals.items():
            self._model.set_submodule(name, module)


def inject(
    model: PreTrainedModel,
    inventory: Inventory,
    costs: FormCosts | None = None,
    kernels: Kernels | None = None,
) -> Injection:
    """Wrap every module that the inventory names. Raises `InjectionError` naming what is wrong.

    kernels: None takes those that suit the model's device and dtype.
    """
    return Injection(model, inventory, costs, kernels)


def layers_of(model: nn.Module, modules: Sequence[ModuleShape]) -> dict[str, nn.Module]:
    """The model's linear layers of these names and widths. Raises `InjectionError` for a missing
    or other one."""
    layers = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for wanted in modules:
        layer = layers.get(wanted.name)
        shape = None if layer is None else linear_shape(layer)
        if layer is None or shape != (wanted.in_features, wanted.out_features):
            raise InjectionError(
                "the backbone has no such linear layer",
                field=wanted.name,
                found="nothing" if layer is None else f"{type(layer).__name__} {shape}",
                expected=f"a linear layer {(wanted.in_features, wanted.out_features)}",
            )
        found[wanted.name] = layer
    return found


def _find_layers(model: PreTrainedModel, inventory: Inventory) -> dict[str, nn.Module]:
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):  # even elsewhere: a plan is made for one injection
            raise InjectionError("an inventory is already injected", field=name)
    found = layers_of(model, inventory.header.modules)
    for module_shape in inventory.header.modules:
        _check_heads(module_shape, inventory.header.heads)
    return found


def _shared_inputs(model: PreTrainedModel, layers: dict[str, nn.Module]) -> list[list[str]]:
    """Names of layers by the very tensor they read (q, k and v; gate and up), seen in one pass."""
    inputs: list[tuple[Tensor, list[str]]] = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if inputs and inputs[-1][0] is args[0]:
                inputs[-1][1].append(name)
            else:
                inputs.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(record(name)) for name, m in layers.items()]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(**{k: v.to(device) for k, v in model.dummy_inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    groups = [names for _, names in inputs]
    seen = {name for names in groups for name in names}
    once = len(seen) == sum(len(names) for names in groups) == len(layers)
    return groups if once else [[name] for name in layers]


def _pack_groups(
    inventory: Inventory,
    groups: list[list[str]],
    parts: Mapping[str, HeadParts],
    device: torch.device,
    dtype: torch.dtype,
) -> list[GroupSlot]:
    slots: list[GroupSlot] = []
    start = 0
    for names in groups:
        a = [inventory.a[name].to(device) for name in names]
        b = [inventory.b[name].to(device) for name in names]
        group = SkillGroup.pack(a, b, inventory.header.scaling, dtype, parts[names[0]])
        stop = start + group.size * group.columns
        slots.append(GroupSlot(len(slots), group, slice(start, stop)))
        start = stop
    return slots
