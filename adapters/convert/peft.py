"""PEFT's Poly (`peft_type` "POLY"): a folder written by `PeftModel.save_pretrained`.

Layout and maths: `peft/tuners/poly/layer.py` and `router.py` of PEFT 0.21.2. Per adapted module

    poly_lora_A                  [H, S, I/H, r]   heads joined along I
    poly_lora_B                  [H, S, r, O/H]   `B.transpose(1, 2)` puts the heads next to O
    poly_router.module_logits    [T, H*S]         head-major: `.view(-1, n_splits, n_skills)`

with `y = base(x) + (x A_t) B_t / r`: no alpha. These are an inventory's own layouts, so the skills
are taken over as they are and only the logits are regrouped, from modules of tasks to tasks of
modules.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from polyhead.adapters.convert.sources import (
    common_dtype,
    module_shape,
    named_tasks,
    read_checkpoint,
    read_json_object,
)
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inventory import (
    BackboneRef,
    Inventory,
    InventoryHeader,
    ModuleShape,
)
from polyhead.adapters.routing import Routing

CONFIG_FILE = "adapter_config.json"
TENSOR_STEM = "adapter_model"
PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".poly_lora_A", ".poly_lora_B"
SUFFIX_LOGITS = ".poly_router.module_logits"

Size = Annotated[int, Field(gt=0, strict=True)]


class PolyConfig(BaseModel):
    """The part of `adapter_config.json` that defines the function, and what may be ignored."""

    model_config = ConfigDict(frozen=True, extra="allow")
    peft_type: Literal["POLY"]
    poly_type: Literal["poly"]
    r: Size
    n_tasks: Size
    n_skills: Size
    n_splits: Size
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    auto_mapping: object = None
    inference_mode: object = None
    init_weights: object = None
    revision: object = None
    task_type: object = None

    @classmethod
    def read(cls, path: Path) -> "PolyConfig":
        """Raises `ConversionError` for another PEFT method and for any option it does not know."""
        try:
            config = cls.model_validate(read_json_object(path))
        except ValidationError as exc:
            error = exc.errors()[0]
            found = "" if error["type"] == "missing" else repr(error["input"])
            raise ConversionError(
                error["msg"], field=f"adapter_config.{error['loc'][0]}", found=found
            ) from exc
        for name, value in (config.model_extra or {}).items():
            if value:
                raise ConversionError(
                    "this option is not implemented",
                    field=f"adapter_config.{name}",
                    found=repr(value),
                    expected="nothing",
                )
        return config

    def adapts(self, name: str) -> bool:
        """Whether PEFT adapts the module of this name (`check_target_module_exists`)."""
        excluded = self.exclude_modules
        return _matches(self.target_modules, name) and not (excluded and _matches(excluded, name))


def convert_peft(
    source: Path, model: nn.Module, backbone_name: str, names: Sequence[str] | None = None
) -> Inventory:
    """The inventory in the PEFT Poly folder `source`, with the routing of each of its tasks.

    model: the bare transformers backbone that the adapter was trained on.
    names: of the T tasks, in the order of PEFT's task ids; `task-0` … when not given.
    PEFT mixes in the checkpoint's dtype, Polyhead in float32: they agree to that dtype's rounding.
    Raises `ConversionError` that names the field or tensor, `InventoryError` or `RoutingError` for
    features that cannot be split and for numbers that are not finite.
    """
    source = Path(source)
    config = PolyConfig.read(source / CONFIG_FILE)
    task_names = named_tasks(config.n_tasks, names)
    modules = _adapted_modules(config, model)
    tensors = read_checkpoint(source, TENSOR_STEM)
    _check_names(tensors, modules)
    header = InventoryHeader(
        backbone=BackboneRef.of(model, backbone_name),
        modules=tuple(modules),
        heads=config.n_splits,
        skills=config.n_skills,
        rank=config.r,
        scaling=1.0 / config.r,
        dtype=common_dtype({name: tensors[name] for name in _skill_names(modules)}),
        provenance={
            "source": "peft",
            "version": config.peft_version,
            "backbone": config.base_model_name_or_path,
        },
    )
    for module in modules:
        _check_shapes(tensors, module, header, config.n_tasks)
    a = {m.name: tensors[PREFIX + m.name + SUFFIX_A].contiguous() for m in modules}
    b = {m.name: tensors[PREFIX + m.name + SUFFIX_B].contiguous() for m in modules}
    inventory = Inventory(header, a, b)
    logits = torch.stack([tensors[PREFIX + m.name + SUFFIX_LOGITS].float() for m in modules], 1)
    shape = inventory.layout.shape("module")
    for name, values in zip(task_names, logits, strict=True):
        inventory.tasks[name] = Routing.checked(
            values.reshape(shape), inventory.layout, field=f"tasks.{name}"
        )
    return inventory


def _matches(patterns: list[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _adapted_modules(config: PolyConfig, model: nn.Module) -> list[ModuleShape]:
    try:
        found = [(name, module) for name, module in model.named_modules() if config.adapts(name)]
    except re.error as exc:
        raise ConversionError(
            "not a regular expression", field="adapter_config.target_modules", found=str(exc)
        ) from exc
    if not found:
        raise ConversionError(
            "the backbone has no such modules",
            field="adapter_config.target_modules",
            found=repr(config.target_modules),
        )
    return [module_shape(name, module) for name, module in found]


def _check_names(tensors: Mapping[str, Tensor], modules: Sequence[ModuleShape]) -> None:
    suffixes = (SUFFIX_A, SUFFIX_B, SUFFIX_LOGITS)
    wanted = {PREFIX + module.name + suffix for module in modules for suffix in suffixes}
    missing = sorted(wanted - tensors.keys())
    odd = sorted(tensors.keys() - wanted)
    if missing:
        raise ConversionError(
            f"{len(missing)} of {len(wanted)} tensors are missing", field=missing[0]
        )
    if odd:
        raise ConversionError(
            f"{len(odd)} tensors belong to no adapted module of the backbone", field=odd[0]
        )


def _skill_names(modules: Sequence[ModuleShape]) -> list[str]:
    return [PREFIX + m.name + suffix for m in modules for suffix in (SUFFIX_A, SUFFIX_B)]


def _check_shapes(
    tensors: Mapping[str, Tensor], module: ModuleShape, header: InventoryHeader, tasks: int
) -> None:
    wanted = {
        SUFFIX_A: header.shape_a(module),
        SUFFIX_B: header.shape_b(module),
        SUFFIX_LOGITS: (tasks, header.heads * header.skills),
    }
    for suffix, shape in wanted.items():
        tensor = tensors[PREFIX + module.name + suffix]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ConversionError(
                "wrong shape or dtype",
                field=PREFIX + module.name + suffix,
                found=f"{tensor.dtype} {list(tensor.shape)}",
                expected=f"floating point {list(shape)}",
            )
