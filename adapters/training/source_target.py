"""T5 and its like: the source is one row, the target another, each token within its own example.

Packing is exact here too. Positions are relative, so an example that begins later in the row has
the same distances; cross attention has no positions at all, and masks keep examples apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from polyhead.adapters.encoder_decoder import check_family
from polyhead.adapters.training.answers import (
    AnswersBatch,
    Encoded,
    answers_of,
    masked_but,
    task_counts,
    task_order,
)
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.layers import Board, Work

CROSS_ATTENTION = "EncDecAttention"


@dataclass(frozen=True, eq=False)
class PackedRow:
    """N tokens of several examples, ordered by task."""

    input_ids: Tensor  # [1, N] long
    segment: Tensor  # [N] long: which example a token belongs to
    counts: tuple[int, ...]  # [U]: how many tokens each of the tasks has, in their order

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[int]], order: Sequence[int], example_task: Sequence[int]
    ) -> "PackedRow":
        """tokens: of each example, in the order that `order` has them in."""
        return cls(
            torch.tensor([[token for own in tokens for token in own]]),
            torch.tensor([i for i, own in zip(order, tokens, strict=True) for _ in own]),
            task_counts(order, example_task, list(map(len, tokens))),
        )


@dataclass(frozen=True, eq=False)
class SourceTargetBatch(AnswersBatch):
    """Every target token predicts one answer token: P is the target's number of tokens."""

    source: PackedRow
    target: PackedRow  # each answer, shifted to the right behind the start token


class SourceTargetReading:
    """See `reading.Reading`. Cross attention's keys and values are made of the source."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises `InjectionError` for a backbone of another family."""
        check_family(model)
        self._model: Any = model
        self._boards: tuple[Board[PackedRow], Board[PackedRow]] = (Board(), Board())
        self._start: int = model.config.decoder_start_token_id

    def board(self, module: str) -> Board[PackedRow]:
        of_source = module.startswith("encoder.") or module.endswith(
            (f"{CROSS_ATTENTION}.k", f"{CROSS_ATTENTION}.v")
        )
        return self._boards[0 if of_source else 1]

    def pack(self, encoded: Sequence[Encoded], example_task: Sequence[int]) -> SourceTargetBatch:
        order = task_order(encoded, example_task)
        sources = [encoded[i].prompt for i in order]
        targets = [(self._start, *encoded[i].answer[:-1]) for i in order]
        return SourceTargetBatch(
            **answers_of(encoded, example_task, order),
            source=PackedRow.of(sources, order, example_task),
            target=PackedRow.of(targets, order, example_task),
        )

    def install(self) -> None:
        """Nothing: the masks do it all."""

    def logits(self, batch: SourceTargetBatch, factors: Factors | None) -> Tensor:
        self.bare()
        if factors is not None:
            pairs = factors.by_module()
            for board, row in zip(self._boards, (batch.source, batch.target), strict=True):
                board.work = Work(row, pairs)
        dtype = self._model.dtype
        source, target = batch.source.segment, batch.target.segment
        hidden = self._model.encoder(
            input_ids=batch.source.input_ids, attention_mask=_mask(source, source, dtype)
        ).last_hidden_state
        out = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=_mask(target, source, dtype),
            decoder_input_ids=batch.target.input_ids,
            decoder_attention_mask=_mask(target, target, dtype, causal=True),
            use_cache=False,
        )
        return cast(Tensor, out.logits.flatten(0, 1))

    def bare(self) -> None:
        for board in self._boards:
            board.work = None

    def restore(self) -> None:
        """Nothing was installed."""

    def exchanged(self, batch: SourceTargetBatch) -> tuple[SourceTargetBatch, Tensor]:
        """Only an answer's last token is predicted from the last token of its target."""
        ends = torch.cat((batch.example_of[1:] != batch.example_of[:-1], batch.gold.new_ones(1)))
        last = ends.bool()
        ids = batch.target.input_ids.clone()
        ids[0, last] = (ids[0, last] + 1) % self._model.config.vocab_size
        return replace(batch, target=replace(batch.target, input_ids=ids)), ~last


def _mask(queries: Tensor, keys: Tensor, dtype: torch.dtype, *, causal: bool = False) -> Tensor:
    """Segments `[Q]` and `[K]` to `[1, 1, Q, K]`, added to attention scores."""
    seen = queries[:, None] == keys[None]
    return masked_but((seen.tril() if causal else seen).unsqueeze(0), dtype)
