"""A backbone whose linear layers hold their weights in 8 or 4 bits, by torchao.

Inventory and private adapters stay as they are: a layer's product comes out in the backbone's own
dtype, and the adapters' part is added to that as to any other.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from polyhead.server.engine.errors import BackboneError

logger = logging.getLogger(__name__)

GROUPS = (64, 32)
"""Weights of a row that share a scale in int4: the first that divides the row."""
INT4_OUTPUTS = 16
"""The CPU's int4 product takes output features in such blocks."""
PUBLIC = "torchao.quantization"
PROTOTYPE = "torchao.prototype.quantization.int4"
DEVICES = ("cpu", "cuda")


def check_quantize(wanted: str, processes: int) -> None:
    """Refuse what can be seen before a backbone is loaded.

    processes: of `--tensor-parallel`. Raises `BackboneError`: they are several, or torchao is
    missing or another than expected.
    """
    if processes > 1:
        raise BackboneError(
            f"--quantize {wanted} with --tensor-parallel {processes}: quantised layers are not "
            "cut; expected --tensor-parallel 1"
        )
    try:
        for name in (PUBLIC, PROTOTYPE):
            import_module(name)
    except ImportError as exc:
        raise BackboneError(
            f"--quantize {wanted} needs torchao ({exc}): pip install 'polyhead[quantize]'"
        ) from exc


def quantize_linears(model: PreTrainedModel, wanted: str) -> int:
    """Replace the weight of every `nn.Linear` but the output head; embeddings stay, too.

    wanted: "int8" or "int4". Returns how many. Raises `BackboneError` where torchao cannot on the
    model's device or in its dtype, or no layer has a width that it takes.
    """
    device = model.device.type
    _check_device(wanted, device, model.dtype)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    groups = {layer: _group(wanted, layer) for layer in linears}
    taken = {layer: group for layer, group in groups.items() if group is not None}
    if not taken:
        raise BackboneError(
            f"--quantize {wanted}: none of {len(linears)} layers of {model.config.model_type} can "
            f"be; expected linear layers with input features in groups of {GROUPS[-1]} and output "
            f"features in blocks of {INT4_OUTPUTS}"
        )
    change: Callable[..., None] = import_module(PUBLIC).quantize_
    with torch.no_grad():
        for layer, group in taken.items():
            change(layer, _recipe(wanted, device, group))
    logger.info("%d of %d linear layers hold %s weights", len(taken), len(linears), wanted)
    return len(taken)


def _check_device(wanted: str, device: str, dtype: torch.dtype) -> None:
    if device not in DEVICES:
        raise BackboneError(f"--quantize {wanted} on {device}: expected --device cpu or cuda")
    if (wanted, device) == ("int4", "cuda") and dtype != torch.bfloat16:
        raise BackboneError(f"--quantize int4 on cuda in {dtype}: expected --dtype bfloat16")


def _group(wanted: str, layer: nn.Linear) -> int | None:
    """How many weights share a scale; None where the layer has to stay as it is."""
    if wanted == "int8":
        return layer.in_features
    if layer.out_features % INT4_OUTPUTS:
        return None
    return next((size for size in GROUPS if layer.in_features % size == 0), None)


def _recipe(wanted: str, device: str, group: int) -> Any:
    """torchao's configuration of weights alone. It must not set inductor up, for that turns the
    float32 products of the whole process to TF32."""
    public, settled = import_module(PUBLIC), {"set_inductor_config": False}
    if wanted == "int8":
        return public.Int8WeightOnlyConfig(**settled)
    if device == "cpu":
        return import_module(PROTOTYPE).PrototypeInt4WeightOnlyConfig(group, **settled)
    tiled = {"int4_packing_format": "tile_packed_to_4d"}
    return public.Int4WeightOnlyConfig(group, **tiled, **settled)
