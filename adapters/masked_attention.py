"""Attention under an explicit mask, by kernels that are known to keep to it."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SOUND = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's kernels for CUDA. On Hopper its first choice is cuDNN's, under which a training run in
bfloat16 learned to look ahead (H200, torch 2.11), and whose masks are read and differentiated
wrongly in other cases as well (pytorch/pytorch#191612, #196678)."""


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """q `[B, heads, N, d]`, k and v `[B, kv_heads, L, d]` to `[B, heads, N, d]`.

    mask: broadcast to `[B, heads, N, L]`, boolean or of q's type. Heads share keys in order where
    there are more of q.
    """
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    if grouped:  # these kernels do not share keys between heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    with sdpa_kernel(SOUND):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
