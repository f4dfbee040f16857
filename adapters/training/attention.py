"""Attention within each example of a batch whose tokens are one row.

For the attention alone the examples are laid out in short rows, several to a row whatever their
tasks, so that nothing is computed between tokens of examples that lie far apart.
"""

from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.masked_attention import masked_attention
from polyhead.adapters.training.encode import TrainingBatch
from polyhead.adapters.training.layers import Board

IMPLEMENTATION = "polyhead_training"
"""The name under which transformers finds this attention."""

# By module, not by context: checkpointed blocks run again on autograd's own threads.
_boards: WeakKeyDictionary[nn.Module, Board[TrainingBatch]] = WeakKeyDictionary()


def install(model: PreTrainedModel, board: Board[TrainingBatch]) -> str | None:
    """Make `model` attend by rows whenever `board` has work. Returns what `restore` needs.

    None, and nothing done, when the backbone's attention cannot be exchanged or is not torch's
    own: such a backbone is given the whole mask instead.
    """
    before = str(model.config._attn_implementation)
    if not getattr(model, "_supports_attention_backend", False) or before != "sdpa":
        return None
    model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        _boards[module] = board
    return before


def restore(model: PreTrainedModel, before: str) -> None:
    """Undo `install`."""
    for module in model.modules():
        _boards.pop(module, None)
    model.set_attn_implementation(before)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q `[1, heads, N, d]` to `[1, N, heads, d]`.

    Without work on the board it is torch's own attention.
    """
    board = _boards.get(module)
    if board is None or board.work is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    odd = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if odd or module.__dict__.get("is_cross_attention"):
        raise InjectionError(
            "the backbone's attention is not supported",
            field=type(module).__name__,
            found=str(odd or "cross attention"),
        )
    batch = board.work.row
    # Autocast may leave q and k wider than v, but kernels want the mask and all three of one type.
    # torch's CPU kernel goes back through short rows of bfloat16 in 2.6 times float32's time.
    on_cpu = value.device.type == "cpu"
    dtype = torch.float32 if on_cpu else value.dtype
    q, k, v = (
        _spread(t[0].transpose(0, 1).to(dtype), batch.places, batch.rows)
        for t in (query, key, value)
    )
    mask = batch.row_mask(dtype, kwargs.get("sliding_window"))
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        found = masked_attention(q, k, v, mask, kwargs.get("scaling")).to(value.dtype)
    flat = found.transpose(1, 2).flatten(0, 1)  # [R * L, heads, d]
    return flat.index_select(0, batch.places).unsqueeze(0), None


def _spread(tokens: Tensor, places: Tensor, rows: tuple[int, int]) -> Tensor:
    """`[N, heads, d]` to `[R, heads, L, d]`."""
    empty = tokens.new_zeros(rows[0] * rows[1], *tokens.shape[1:])
    padded = empty.index_copy(0, places, tokens)
    return padded.view(*rows, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
