"""Embeddings of texts by the bare backbone, of which a generator's contexts are made."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH = 64


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """`[N, D]` float32 on the CPU: each text's mean over its tokens of the last hidden states.

    model: a causal backbone without adapters. No text may be without tokens.
    """
    found = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ids = [one.ids for one in found]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths pad little
    means = torch.empty(len(ids), model.config.hidden_size)
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        means[chosen] = _means(model, [ids[i] for i in chosen]).cpu()
    return means


def _means(model: PreTrainedModel, ids: Sequence[list[int]]) -> Tensor:
    """Padded on the right, where nothing before can see it."""
    longest = max(map(len, ids))
    padded = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    seen = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    padded, seen = padded.to(model.device), seen.to(model.device)
    out = cast(Any, model.base_model)(input_ids=padded, attention_mask=seen, use_cache=False)
    hidden: Tensor = out.last_hidden_state.float() * seen[..., None]
    return hidden.sum(1) / seen.sum(1, keepdim=True)
