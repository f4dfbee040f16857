"""Causal backbones: prompt and answer are one row, read once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.training import attention
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.encode import TrainingBatch, pack
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.layers import Board, Work


class CausalReading:
    """See `reading.Reading`. Attention and output head see no more than they need."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises `InjectionError` when the backbone has no output head."""
        self._model = model
        self._board: Board[TrainingBatch] = Board()
        self._head = _output_head(model)
        self._keep: Tensor | None = None

    def board(self, _module: str) -> Board[TrainingBatch]:
        return self._board

    def pack(self, encoded: Sequence[Encoded], example_task: Sequence[int]) -> TrainingBatch:
        return pack(encoded, example_task)

    def install(self) -> None:
        self._attention = attention.install(self._model, self._board)
        self._hook = self._head.register_forward_pre_hook(self._answer_places)

    def logits(self, batch: TrainingBatch, factors: Factors | None) -> Tensor:
        self._board.work = None if factors is None else Work(batch, factors.by_module())
        self._keep = batch.predict_at
        try:
            out = cast(Any, self._model)(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=self._mask(batch),
                use_cache=False,
            )
        finally:
            self._keep = None
        return cast(Tensor, out.logits.flatten(0, 1))  # one index would cost a copy in backward

    def bare(self) -> None:
        self._board.work = None

    def restore(self) -> None:
        self._hook.remove()
        if self._attention is not None:
            attention.restore(self._model, self._attention)

    def exchanged(self, batch: TrainingBatch) -> tuple[TrainingBatch, Tensor]:
        """No answer is predicted from an example's last token."""
        ends = batch.segment[1:] != batch.segment[:-1]
        last = torch.cat((ends, ends.new_ones(1))).nonzero()[:, 0]
        ids = batch.input_ids.clone()
        ids[0, last] = (ids[0, last] + 1) % self._model.config.vocab_size
        return replace(batch, input_ids=ids), torch.ones_like(batch.gold, dtype=torch.bool)

    def _mask(self, batch: TrainingBatch) -> Tensor:
        if self._attention is None or self._board.work is None:
            return batch.mask(self._model.dtype)
        # Four dimensions keep transformers from making a mask, which nobody would read.
        return batch.input_ids.new_empty(1, 1, 1, 1)

    def _answer_places(self, _head: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Cuts the output head's input `[1, N, D]` to `[1, P, D]`: the head is a fifth of a small
        model, and most tokens are prompt."""
        if self._keep is None:
            return None
        return (args[0].index_select(1, self._keep), *args[1:])


def _output_head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise InjectionError("the backbone has no output head", field="backbone")
    return head
