"""Root-mean-square norms compiled for bfloat16 on the CPU: one pass over a row instead of torch's
six, a third of their time. Every rounding to bfloat16 is the layer's own; only the order of the
sum may differ.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.compiled import compiled_for
from polyhead.adapters.cpu_kernels import compiled
from polyhead.server.engine.cpu_attention import ORDERED, _wide

logger = logging.getLogger(__name__)

PROBE_ROWS = 4
"""Random rows on which a layer must agree with what is to take its place."""
TOLERANCE = 2.0**-7
"""Of each number: the distance of two neighbours in bfloat16."""

f32, i32 = np.float32, np.int32
_widened: Any = _wide  # mypy: it has no types


@compiled(inline="always")
def _narrow(x):  # type: ignore[no-untyped-def]
    """float32 to the bits of the nearest bfloat16, of two as near the even one."""
    bits = f32(x).view(np.int32)
    return np.int16((bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16))


@compiled(fastmath=ORDERED)
def _norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """out = weight * (x / sqrt(mean(x²) + epsilon)) in each row (Zhang and Sennrich, 1910.07467).

    x, out `[N, d]`, weight `[d]`, contiguous, the bits of bfloat16 as int16.
    """
    width = x.shape[1]
    for row in range(x.shape[0]):
        own, to = x[row], out[row]
        total = f32(0.0)
        for i in range(width):
            total += _widened(own[i]) * _widened(own[i])
        scale = f32(1.0) / np.sqrt(total / f32(width) + f32(epsilon))
        for i in range(width):
            to[i] = _narrow(_widened(weight[i]) * _widened(_narrow(_widened(own[i]) * scale)))


def compile_norms(model: PreTrainedModel) -> int:
    """Give every RMS norm of a bfloat16 backbone on a CPU the compiled pass.

    Returns how many. A layer that computes anything else, Gemma's `1 + weight` for one, is found
    out by a probe and left as it is.
    """
    if not compiled_for(model.dtype, model.device) or model.dtype != torch.bfloat16:
        return 0
    taken = 0
    for layer in model.modules():
        weight, epsilon = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", None)
        if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
            continue
        if weight.ndim == 1 and weight.dtype == torch.bfloat16:
            compiled_norm = _Compiled(layer, weight, epsilon)
            if compiled_norm.agrees():
                layer.forward = compiled_norm.forward
                taken += 1
    logger.info("compiled %d norms", taken)
    return taken


class _Compiled:
    """What takes the place of a layer's `forward`."""

    def __init__(self, layer: nn.Module, weight: Tensor, epsilon: float) -> None:
        self._plain: Any = layer.forward
        self._weight, self._epsilon = _bits(weight), epsilon

    def agrees(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        shape = (PROBE_ROWS, len(self._weight))
        x = torch.randn(shape, generator=generator).to(torch.bfloat16)
        with torch.inference_mode():
            wanted, found = self._plain(x), self.forward(x)
        return wanted.dtype == found.dtype and torch.allclose(
            wanted.float(), found.float(), rtol=TOLERANCE, atol=0
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        if x.dtype != torch.bfloat16 or torch.is_grad_enabled() or not x.is_contiguous():
            found: Tensor = self._plain(x)
            return found
        out = torch.empty_like(x)
        rows = (-1, x.shape[-1])
        _norm(_bits(x.view(rows)), self._weight, self._epsilon, _bits(out.view(rows)))
        return out


def _bits(x: Tensor) -> Any:
    return x.detach().view(torch.int16).numpy()
