"""Attention that does not keep to its mask is found before anything is learned from it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_model
from torch import Tensor
from training_world import encoded, examples, trainable

from polyhead.adapters.training.causality import check_causal
from polyhead.adapters.training.encode import TrainingBatch, pack
from polyhead.adapters.training.errors import TrainingError


def batch() -> TrainingBatch:
    return pack(*encoded(examples()))


def test_sound_attention_passes() -> None:
    check_causal(trainable(tiny_model()), batch())


def test_attention_without_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = F.scaled_dot_product_attention

    def leaking(*args: Any, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        return sound(*args, attn_mask=torch.zeros_like(attn_mask), **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", leaking)
    with pytest.raises(TrainingError, match="does not keep to its mask"):
        check_causal(trainable(tiny_model()), batch())


def test_under_autocast_the_mask_has_the_type_of_what_it_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels have read a float32 mask as if it were bfloat16. On a CPU both are float32."""
    sound = F.scaled_dot_product_attention
    seen: set[tuple[torch.dtype, ...]] = set()

    def watching(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        seen.add((q.dtype, k.dtype, v.dtype, attn_mask.dtype))
        return sound(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    with torch.autocast("cpu", torch.bfloat16):
        trainable(tiny_model().to(torch.bfloat16))(batch())
    assert seen == {(torch.float32,) * 4}
