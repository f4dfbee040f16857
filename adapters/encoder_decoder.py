"""Batches of several tasks through T5 and its like: encode once, then decode or score.

A plan is for one number of tokens, and an encoder-decoder has two: the source's and the target's.
The keys and values of cross attention belong to the source, though transformers computes them in
the decoder's first step; here they are computed with the encoder, under its plan.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import Injection
from polyhead.adapters.plan import Adapter, use_plan

FAMILIES = ("t5", "mt5")
"""`model_type` of the backbones whose cross attention is found here; T0 and Flan-T5 are t5."""
IGNORED = -100
"""The label that no loss counts, as in transformers."""


def check_family(model: PreTrainedModel) -> None:
    """Raises `InjectionError` for a backbone that is not of `FAMILIES`."""
    if model.config.model_type not in FAMILIES:
        raise InjectionError(
            "no encoder-decoder that can be served",
            field="model_type",
            found=model.config.model_type,
            expected=" or ".join(FAMILIES),
        )


def cross_attentions(model: Any) -> list[Any]:
    """The cross attention of each of the decoder's layers."""
    return [block.layer[1].EncDecAttention for block in model.decoder.block]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Sources of B rows, encoded by each row's adapter. L is the longest source."""

    adapters: Sequence[Adapter]
    hidden: Tensor  # [B, L, D]
    mask: Tensor  # [B, L], 0 on padding
    cross: Sequence[tuple[Tensor, Tensor]]  # keys and values [B, heads, L, D/heads] by layer

    def cache(self) -> EncoderDecoderCache:
        """A fresh cache for decoding: no target tokens yet, cross attention complete."""
        source = DynamicCache()
        for layer, (keys, values) in enumerate(self.cross):
            source.update(keys, values, layer)
        cache = EncoderDecoderCache(DynamicCache(), source)
        cache.is_updated = dict.fromkeys(range(len(self.cross)), True)
        return cache


class EncoderDecoder:
    """A T5-like backbone with an inventory inside. Rows of a batch keep step with each other.

    Raises `InjectionError` for a backbone of another family.
    """

    def __init__(self, model: PreTrainedModel, injection: Injection) -> None:
        check_family(model)
        self._model: Any = model
        self._injection = injection
        known = inspect.signature(model.forward).parameters
        self._cache_keyword = "cache" if "cache" in known else "past_key_values"

    @torch.inference_mode()
    def encode(self, ids: Tensor, mask: Tensor, adapters: Sequence[Adapter]) -> Encoded:
        """ids and mask `[B, L]`, padded on the right; `adapters[i]` answers row i."""
        with use_plan(self._injection.plan(adapters, [ids.shape[1]] * len(ids))):
            hidden = self._model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            cross = [self._cross(layer, hidden) for layer in cross_attentions(self._model)]
        return Encoded(adapters, hidden, mask, cross)

    @staticmethod
    def _cross(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*hidden.shape[:-1], -1, attention.key_value_proj_dim)
        keys = attention.k(hidden).view(shape).transpose(1, 2)
        return keys, attention.v(hidden).view(shape).transpose(1, 2)

    @torch.inference_mode()
    def decode(self, encoded: Encoded, ids: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """Logits `[B, T, vocabulary]` of the next T target tokens of every row, ids `[B, T]`."""
        plan = self._injection.plan(encoded.adapters, [ids.shape[1]] * len(ids))
        with use_plan(plan):
            output = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
                attention_mask=encoded.mask,
                decoder_input_ids=ids,
                use_cache=True,
                **{self._cache_keyword: cache},
            )
        return cast(Tensor, output.logits)

    def greedy(self, encoded: Encoded, limit: int) -> list[list[int]]:
        """The likeliest tokens of each row, up to `limit`, its end-of-text token included."""
        cache, end = encoded.cache(), self._model.config.eos_token_id
        ids = self._starts(encoded)
        answers: list[list[int]] = [[] for _ in encoded.adapters]
        for _ in range(limit):
            ids = self.decode(encoded, ids, cache)[:, -1].argmax(-1, keepdim=True)
            for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
                if end is None or end not in answer:
                    answer.append(token)
            if end is not None and all(end in answer for answer in answers):
                break
        return answers

    def losses(self, encoded: Encoded, labels: Tensor) -> Tensor:
        """`[B]`: the mean negative log-probability of each row's labels `[B, T]`, `IGNORED` on
        padding. The least is the answer of rank classification with length normalisation, as T0
        is evaluated (arXiv 2110.08207, section 5.2; the length as in arXiv 2205.05638, 3.2)."""
        shifted = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, 0)  # seen by no label
        ids = torch.cat([self._starts(encoded), shifted], dim=1)
        logits = self.decode(encoded, ids, encoded.cache()).float()
        each = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        return each.sum(1) / (labels != IGNORED).sum(1)

    def _starts(self, encoded: Encoded) -> Tensor:
        start = self._model.config.decoder_start_token_id
        return encoded.mask.new_full((len(encoded.adapters), 1), start)
