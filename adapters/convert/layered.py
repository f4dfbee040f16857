"""What checkpoints of routed layers have in common, whoever wrote them.

A `RoutedLayer` is one layer's skills in an inventory's own form, beside the logits that its
selector holds. Layers may share a selector, of which a checkpoint often keeps one copy only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead.adapters.convert.sources import common_dtype, module_shape, named_tasks
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inventory import BackboneRef, Inventory, InventoryHeader, ModuleShape
from polyhead.adapters.routing import Granularity, Routing


@dataclass(frozen=True)
class Trained:
    """What a foreign checkpoint says: per module A `[H, S, I/H, r]`, B `[H, S, r, O/H]`, and the
    logits `[T, H, S]` of the selector that it uses; `names` of the T tasks, if it knows them."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]
    scaling: float
    provenance: Mapping[str, object]
    names: Sequence[str] | None = None
    granularity: Granularity = "module"


def to_inventory(
    trained: Trained, model: nn.Module, backbone_name: str, names: Sequence[str] | None
) -> Inventory:
    """The inventory of a checkpoint for the bare backbone `model`, with the routings of its tasks.

    Raises `ConversionError` that names the module, `InventoryError` or `RoutingError`.
    """
    layers = dict(model.named_modules())
    strange = sorted(trained.a.keys() - layers.keys())
    if strange:
        raise ConversionError("the backbone has no such module", field=strange[0])
    modules = [module_shape(name, layers[name]) for name in layers if name in trained.a]
    heads, skills, _, rank = trained.a[modules[0].name].shape
    tensors = {f"{name}.A": a for name, a in trained.a.items()}
    tensors |= {f"{name}.B": b for name, b in trained.b.items()}
    header = InventoryHeader(
        backbone=BackboneRef.of(model, backbone_name),
        modules=tuple(modules),
        heads=heads,
        skills=skills,
        rank=rank,
        scaling=trained.scaling,
        dtype=common_dtype(tensors),
        provenance=dict(trained.provenance),
    )
    a = {name: tensor.contiguous() for name, tensor in trained.a.items()}
    b = {name: tensor.contiguous() for name, tensor in trained.b.items()}
    inventory = Inventory(header, a, b)
    _add_tasks(inventory, trained, modules, names)
    return inventory


def _add_tasks(
    inventory: Inventory,
    trained: Trained,
    modules: Sequence[ModuleShape],
    names: Sequence[str] | None,
) -> None:
    layout = inventory.layout
    each = [trained.logits[module.name].float() for module in modules]
    for module, logits in zip(modules, each, strict=True):
        if logits.shape != (len(each[0]), layout.heads, layout.skills):
            raise ConversionError(
                "wrong shape of the logits",
                field=module.name,
                found=str(list(logits.shape)),
                expected=str([len(each[0]), layout.heads, layout.skills]),
            )
    stacked = torch.stack(each, 1)  # [T, M, H, S]
    granularity = trained.granularity
    if granularity != "module":
        # A coarser granularity of ours holds only where the checkpoint's groups are the same.
        rows = layout.groups(granularity)
        first = [rows.index(row) for row in range(max(rows) + 1)]
        if torch.equal(stacked[:, first][:, list(rows)], stacked):
            stacked = stacked[:, first] if granularity == "block" else stacked[:, 0]
        else:
            granularity = "module"
    wanted = named_tasks(len(stacked), names if names is not None else trained.names)
    for name, values in zip(wanted, stacked, strict=True):
        inventory.tasks[name] = Routing.checked(
            values, layout, granularity=granularity, field=f"tasks.{name}"
        )


def shared_logits(
    logits: Mapping[str, Tensor], modules: Sequence[str], group_of: Callable[[str], str]
) -> dict[str, Tensor]:
    """For every module the logits of its group, of which one copy or several may be there.

    logits: by the module under which a checkpoint keeps them. Raises `ConversionError` for a group
    without any and for one whose copies differ.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in logits.items():
        known = found.setdefault(group_of(name), tensor)
        if not torch.equal(known, tensor):
            raise ConversionError(
                "layers that share a selector have different logits",
                field=name,
                expected=f"one routing for {group_of(name)!r}",
            )
    for name in modules:
        if group_of(name) not in found:
            raise ConversionError(
                "no layer of its group has logits",
                field=name,
                expected=f"module_logits for {group_of(name)!r}",
            )
    return {name: found[group_of(name)] for name in modules}


def by_module(
    tensors: Mapping[str, Tensor], suffixes: Sequence[str], prefix: str
) -> list[dict[str, Tensor]]:
    """The tensors of each suffix by module, which is what stands between prefix and suffix.

    The first two suffixes are A's and B's, which every module must have. Raises `ConversionError`
    for a tensor of another name: who trained more than the adapters has another function.
    """
    found: list[dict[str, Tensor]] = [{} for _ in suffixes]
    for name, tensor in tensors.items():
        index = next((i for i, suffix in enumerate(suffixes) if name.endswith(suffix)), None)
        if index is None or not name.startswith(prefix):
            raise ConversionError(
                "a tensor that is none of the adapters'",
                field=name,
                expected=f"names that begin with {prefix!r} and end with one of {list(suffixes)}",
            )
        if not tensor.is_floating_point():
            raise ConversionError("wrong dtype", field=name, found=str(tensor.dtype))
        found[index][name.removeprefix(prefix).removesuffix(suffixes[index])] = tensor
    lonely = sorted(found[0].keys() ^ found[1].keys())
    if lonely or not found[0]:
        raise ConversionError("A or B is missing", field=lonely[0] if lonely else prefix)
    return found
