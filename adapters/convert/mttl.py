"""mttl's checkpoints of Polytropon and multi-head routing, in two formats.

Camera-ready (github.com/microsoft/mttl, tag mhr-camera-ready; `models/adapters.py`,
`models/modifiers/poly.py`, `routing.py`): a Lightning checkpoint whose options lie in it or in
`config.json` beside it. Per adapted layer, under `model.`,

    lora_a                    [H, S, I/H, r]
    lora_b                    [H, S, r, O/H]
    selector.module_logits    [T, H*S], kept once for all layers of a group (`router_granularity`)

with `y = base(x) + alpha / r * (x A_t) B_t`, alpha 1 unless given, and epsilon 1e-12.

Main (same repository, main branch; `models/modifiers/lora.py`, `containers/`): `mttl_config.json`
and `mttl_weights.bin`. Per adapted layer, under `model.`,

    experts.lora_a            [S, H, I/H, r]
    experts.lora_b            [S, r, H, O/H]
    selector.module_logits    [T + 1, H*S], the last row uniform, for tasks that nobody knows

alpha 16 unless given, and epsilon 1e-8, which changes a weight by less than 1e-8 of the row's sum
of sigmoids; it is not replayed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polyhead.adapters.convert.layered import Trained, by_module, shared_logits, to_inventory
from polyhead.adapters.convert.mttl_options import (
    check_camera_ready,
    common_alpha,
    number,
    poly_selector,
)
from polyhead.adapters.convert.sources import (
    read_json_object,
    read_pickled_object,
    read_state,
    state_dict,
)
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Granularity

PREFIX = "model."
SELECTOR = ".selector.module_logits"
MAIN_CONFIG, MAIN_WEIGHTS = "mttl_config.json", "mttl_weights.bin"
PART_OF_NAME = {"layerwise": "layer.", "blockwise": "block.", "coderwise": "coder."}
"""Camera-ready: layers share a selector whose names agree up to what follows this."""
OURS: dict[str, Granularity] = {"coarsegrained": "model", "blockwise": "block"}


def convert_mttl(
    source: Path, model: nn.Module, backbone_name: str, names: Sequence[str] | None = None
) -> Inventory:
    """The inventory in an mttl checkpoint, of whichever format, with its tasks' routings.

    source: the folder that has `mttl_config.json`, or one with a single `.ckpt`, or that file.
    names: of the tasks, in the order of training; else the checkpoint's own, else `task-0` ….
    Raises `ConversionError` that names the option or tensor, `InventoryError` or `RoutingError`.
    """
    source = Path(source)
    main = (source / MAIN_CONFIG).exists()
    trained = _main(source) if main else _camera_ready(source)
    return to_inventory(trained, model, backbone_name, names)


def _camera_ready(source: Path) -> Trained:
    path = source if source.is_file() else _single_checkpoint(source)
    whole = read_pickled_object(path)
    tensors = state_dict(path, whole.get("state_dict", whole))
    config = whole.get("hyper_parameters")
    if not isinstance(config, dict):
        config = read_json_object(path.parent / "config.json")
    check_camera_ready(config)
    a, b, logits = by_module(tensors, (".lora_a", ".lora_b", SELECTOR), PREFIX)
    granularity = config.get("router_granularity", "finegrained")
    shared = shared_logits(logits, list(a), _camera_ready_group(granularity))
    heads, skills, _, rank = _four_dimensions(a)
    return Trained(
        a,
        b,
        {name: _split(name, tensor, heads, skills) for name, tensor in shared.items()},
        number(config, "lora_alpha", 1.0) / rank,
        {"source": "mttl", "format": "camera-ready", "backbone": config.get("model")},
        granularity=OURS.get(granularity, "module"),
    )


def _main(source: Path) -> Trained:
    config = read_json_object(source / MAIN_CONFIG)
    selector = poly_selector(config)
    tensors = read_state(source / MAIN_WEIGHTS)
    suffixes = (".experts.lora_a", ".experts.lora_b", SELECTOR)
    a, b, logits = by_module(tensors, suffixes, PREFIX)
    granularity = selector.get("router_granularity", "*")
    shared = shared_logits(logits, list(a), _main_group(granularity))
    skills, heads, _, rank = _four_dimensions(a)
    _four_dimensions(b)
    names = selector.get("task_names") or None
    count = len(names) if names else 1
    split = {name: _split(name, tensor, heads, skills) for name, tensor in shared.items()}
    for name, tensor in split.items():
        if len(tensor) not in (count, count + 1):
            raise ConversionError(
                "as many rows of logits as tasks are needed, or one more",
                field=name + SELECTOR,
                found=str(len(tensor)),
                expected=f"{count} or {count + 1}",
            )
    return Trained(
        {name: tensor.permute(1, 0, 2, 3) for name, tensor in a.items()},
        {name: tensor.permute(2, 0, 1, 3) for name, tensor in b.items()},
        {name: tensor[:count] for name, tensor in split.items()},
        common_alpha(config) / rank,
        {"source": "mttl", "format": "main", "backbone": config.get("base_model")},
        names=names,
        granularity=OURS.get(granularity, "module"),
    )


def _camera_ready_group(granularity: Any) -> Callable[[str], str]:
    """By which name layers share a selector (`_extract_identifier` of the camera-ready code)."""
    if granularity == "finegrained":
        return str
    if granularity == "coarsegrained":
        return lambda _: ""
    part = PART_OF_NAME.get(granularity)
    if part is None:
        raise ConversionError(
            "unknown granularity",
            field="config.router_granularity",
            found=repr(granularity),
            expected=str(["finegrained", "coarsegrained", *PART_OF_NAME]),
        )

    def group(name: str) -> str:
        before, found, after = name.partition(part)
        if not found:
            raise ConversionError(
                f"granularity {granularity!r} means nothing for this layer",
                field=name,
                expected=f"a name with {part!r} in it",
            )
        return before + part + after.split(".", 1)[0]

    return group


def _main_group(granularity: Any) -> Callable[[str], str]:
    """By which name layers share a selector (`_extract_identifier` of the main branch)."""
    if granularity in ("*", "finegrained"):
        return str
    if granularity == "coarsegrained":
        return lambda _: "shared"

    def group(name: str) -> str:
        before, found, _ = name.partition(str(granularity))
        if not found:
            raise ConversionError(
                "this granularity means nothing for a layer",
                field="mttl_config.selector_config.router_granularity",
                found=repr(granularity),
                expected=f"a part of {name!r}",
            )
        return before + found

    return group


def _four_dimensions(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ConversionError(
                "skills of wrong shape",
                field=name,
                found=str(list(tensor.shape)),
                expected="four dimensions",
            )
    return tuple(next(iter(tensors.values())).shape)


def _split(name: str, logits: Tensor, heads: int, skills: int) -> Tensor:
    """`[T, H*S]`, head-major, as `[T, H, S]`."""
    if logits.ndim != 2 or logits.shape[1] != heads * skills:
        raise ConversionError(
            "wrong shape of the logits",
            field=name + SELECTOR,
            found=str(list(logits.shape)),
            expected=f"[T, {heads * skills}]",
        )
    return logits.reshape(-1, heads, skills)


def _single_checkpoint(folder: Path) -> Path:
    found = sorted(folder.glob("*.ckpt"))
    if len(found) != 1:
        raise ConversionError(
            f"{folder}: no checkpoint of mttl, or several",
            found=str([path.name for path in found]),
            expected=f"{MAIN_CONFIG}, or one file *.ckpt",
        )
    return found[0]
