"""An inventory whose skills are existing PEFT LoRAs of one rank.

Skill i is LoRA i, in the order given; H = 1. Every LoRA becomes a task with the routing that is 1
for its own skill and 0 for the others, at granularity `model`. Where all scalings are equal the
inventory has that scaling and the LoRAs' numbers; where they differ, each LoRA's A and B take the
square root of its own, as PEFT's `add_weighted_adapter(combination_type="linear")` splits it:

    w on skills 1 … S:   y = base(x) + scaling * (x sum_i w_i A_i) (sum_i w_i B_i)

which is LoRAX's `linear` merge with the weights w, and PEFT's with the weights w².
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.adapters.convert.sources import module_shape, named_tasks, read_checkpoint
from polyhead.adapters.errors import ConversionError, PrivateAdapterError
from polyhead.adapters.inventory import BackboneRef, Inventory, InventoryHeader, ModuleShape
from polyhead.adapters.peft_lora import CONFIG_FILE, LoraConfig, LoraFactors, unscaled_factors
from polyhead.adapters.routing import Routing

Missing = Literal["zeros", "refuse"]
"""What to do where one LoRA adapts a module that another leaves bare."""
TENSOR_STEM = "adapter_model"


def read_lora(folder: Path, model: nn.Module) -> LoraFactors:
    """The LoRA in a local PEFT folder, of safetensors or a pickle of tensors, in float32.

    Raises `ConversionError` that names the folder and the option or tensor.
    """
    try:
        config = LoraConfig.parse((folder / CONFIG_FILE).read_bytes())
        read = unscaled_factors(config, read_checkpoint(folder, TENSOR_STEM))
    except OSError as exc:
        raise ConversionError(f"{folder / CONFIG_FILE}: {exc.strerror}") from exc
    except PrivateAdapterError as exc:
        raise ConversionError(f"{folder}: {exc}") from exc
    odd = sorted((read.a.keys() ^ read.b.keys()) or ())
    if odd or not read.a:
        raise ConversionError(f"{folder}: A or B is missing", field=odd[0] if odd else "")
    layers = dict(model.named_modules())
    for name in read.a:
        _check_module(folder, name, layers, read)
    return LoraFactors({n: a.float() for n, a in read.a.items()}, read.b, read.scaling)


def inventory_from_loras(
    loras: Mapping[str, Path], model: nn.Module, backbone_name: str, missing: Missing = "zeros"
) -> Inventory:
    """The inventory whose skills and tasks are the PEFT LoRAs in the folders, by task name.

    model: the bare backbone that they were trained on. missing: whether a module that a LoRA
    leaves bare gets zeros from it, which adds nothing, or is refused. Raises `ConversionError`
    for LoRAs of several ranks and whatever else cannot be, naming the folder.
    """
    names = named_tasks(len(loras), list(loras))
    if not names:
        raise ConversionError("no LoRAs", field="loras", expected="at least one folder")
    read = {name: read_lora(Path(folder), model) for name, folder in loras.items()}
    modules = _union(read, loras, model, missing)
    rank = _common_rank(read, loras)
    scalings = {scaling for one in read.values() for scaling in one.scaling.values()}
    common = next(iter(scalings)) if len(scalings) == 1 else None
    header = InventoryHeader(
        backbone=BackboneRef.of(model, backbone_name),
        modules=tuple(modules),
        heads=1,
        skills=len(names),
        rank=rank,
        scaling=1.0 if common is None else common,
        provenance={"source": "peft-loras", "skills": names},
    )
    sides = [_Side(one, rank, split=common is None) for one in read.values()]
    a = {m.name: torch.stack([side.a(m) for side in sides]).unsqueeze(0) for m in modules}
    b = {m.name: torch.stack([side.b(m) for side in sides]).unsqueeze(0) for m in modules}
    inventory = Inventory(header, a, b)
    for name, row in zip(names, torch.eye(len(names)), strict=True):
        inventory.tasks[name] = Routing.checked(
            row.unsqueeze(0), inventory.layout, "weights", "model", field=f"tasks.{name}"
        )
    return inventory


@dataclass(frozen=True)
class _Side:
    """One LoRA as a skill. split: its scaling goes to A and B in equal parts, its sign to B."""

    lora: LoraFactors
    rank: int
    split: bool

    def a(self, module: ModuleShape) -> Tensor:
        """`[I, r]`, zeros where the LoRA leaves the module bare."""
        if module.name not in self.lora.a:
            return torch.zeros(module.in_features, self.rank)
        return self.lora.a[module.name] * self._factor(module.name)

    def b(self, module: ModuleShape) -> Tensor:
        """`[r, O]`."""
        if module.name not in self.lora.b:
            return torch.zeros(self.rank, module.out_features)
        sign = math.copysign(1.0, self.lora.scaling[module.name]) if self.split else 1.0
        return self.lora.b[module.name] * (self._factor(module.name) * sign)

    def _factor(self, name: str) -> float:
        return math.sqrt(abs(self.lora.scaling[name])) if self.split else 1.0


def _union(
    read: Mapping[str, LoraFactors], loras: Mapping[str, Path], model: nn.Module, missing: Missing
) -> list[ModuleShape]:
    """Every module that any LoRA adapts, in the model's own order."""
    every = {name for one in read.values() for name in one.a}
    for task, one in read.items() if missing == "refuse" else ():
        bare = sorted(every - one.a.keys())
        if bare:
            raise ConversionError(
                f"{loras[task]}: {len(bare)} modules that other LoRAs adapt are left bare",
                field=bare[0],
                expected="the same modules in every LoRA, or zeros where they are missing",
            )
    return [module_shape(name, layer) for name, layer in model.named_modules() if name in every]


def _common_rank(read: Mapping[str, LoraFactors], loras: Mapping[str, Path]) -> int:
    first = next(iter(read))
    wanted = next(iter(read[first].a.values())).shape[1]
    for task, one in read.items():
        for name, a in one.a.items():
            if a.shape[1] != wanted:
                raise ConversionError(
                    f"{loras[task]}: LoRAs of different ranks cannot be skills of one inventory",
                    field=name,
                    found=f"rank {a.shape[1]}",
                    expected=f"rank {wanted} as {loras[first]}",
                )
    return int(wanted)


def _check_module(
    folder: Path, name: str, layers: Mapping[str, nn.Module], read: LoraFactors
) -> None:
    if name not in layers:
        raise ConversionError(f"{folder}: the backbone has no such module", field=name)
    shape = module_shape(name, layers[name])
    found = (read.a[name].shape[0], read.b[name].shape[1], read.b[name].shape[0])
    if found != (shape.in_features, shape.out_features, read.a[name].shape[1]):
        raise ConversionError(
            f"{folder}: wrong shape",
            field=name,
            found=f"A {list(read.a[name].shape)}, B {list(read.b[name].shape)}",
            expected=f"A [{shape.in_features}, r], B [r, {shape.out_features}]",
        )
