"""A backbone's bfloat16 weights in the order in which the CPU's products read them.

torch hands oneDNN a linear layer's weight as it lies, and oneDNN reorders it in every call.
Reordered once at loading, a product takes 0.4 to 0.9 of the time and gives the same bits.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.sharding import ShardedLinear

logger = logging.getLogger(__name__)

ROWS = 64
"""The number of rows that the order is chosen for; it serves any number."""
EXACT_ROWS = 16
"""Up to here a product has as many rows as are asked for."""


def pack_linears(model: PreTrainedModel) -> int:
    """Give every `nn.Linear` in bfloat16 on a CPU a reordered copy of its weight to compute with,
    or this process's part of one.

    Returns how many. 0 where oneDNN does not take them: the layers are left as they are. The
    weights themselves stay what and where they were, so memory grows by their size.
    """
    if not _supported():
        return 0
    packed = 0
    for layer in model.modules():
        if type(layer) is nn.Linear and _fits(layer.weight):
            layer.forward = _Packed(layer).forward  # type: ignore[method-assign]
            packed += 1
        elif isinstance(layer, ShardedLinear) and _fits(layer.weight):
            layer.part = _Packed(layer).forward  # type: ignore[method-assign,assignment]
            packed += 1
    logger.info("reordered the weights of %d linear layers", packed)
    return packed


class _Packed:
    """What takes the place of a layer's `forward`."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)

    def forward(self, input: Tensor) -> Tensor:
        x, layer = input, self._layer  # torch's name for it
        if x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, layer.weight, layer.bias)
        rows = x.numel() // x.shape[-1]
        more = rounded_rows(rows) - rows
        if more:
            flat = F.pad(x.reshape(rows, -1), (0, 0, 0, more))
            return self._product(flat)[:rows].view(*x.shape[:-1], -1)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        found: Tensor = product(x, self._weight, self._layer.bias, "none", [], "")
        return found


def rounded_rows(rows: int) -> int:
    """The number of rows that are computed, at most an eighth more: eight numbers between a power
    of two and the next.

    oneDNN compiles code for every number of rows that it meets and keeps it, half a megabyte for
    each shape of a layer: with every number from 1 to 128, a server grew by hundreds of megabytes
    over hours, and paused for 10 ms whenever a step had a new one.
    """
    unit = max(1, (1 << (rows - 1).bit_length()) // EXACT_ROWS)
    return -(-rows // unit) * unit


def _fits(weight: Tensor) -> bool:
    """A quantised weight is a tensor of another class, which has a product of its own."""
    plain = type(weight) in (nn.Parameter, Tensor)
    return plain and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def _supported() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn: Any = torch.ops.mkldnn
    wanted = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(mkldnn, name) for name in wanted) and bool(
        mkldnn._is_mkldnn_bf16_supported()
    )
