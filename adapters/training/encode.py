"""From examples to batches: all tokens in one row, without padding, ordered by task.

Packing is exact: a token sees only the tokens before it in its own example, and positions start
again with every example, so each example's loss is what it would be alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from polyhead.adapters.training.answers import (
    AnswersBatch,
    Encoded,
    answers_of,
    masked_but,
    task_counts,
    task_order,
)
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.errors import DataError

INPUT = "{input}"
DEFAULT_TEMPLATE = "{input}\n"
SHORT_ROW = 64
"""Examples share a row of attention up to this length: longer ones cost more than they fill."""


class Encoder:
    """Turns examples into tokens as serving does: the filled template is encoded alone, with no
    special tokens added, and the answer is encoded apart from it and closed by end-of-text."""

    def __init__(
        self,
        tokenizer: Any,
        template: str = DEFAULT_TEMPLATE,
        max_tokens: int = 512,
        *,
        closed: bool = False,
    ) -> None:
        """tokenizer: a transformers fast tokenizer. closed: whether prompts end as the tokenizer
        ends a text, as sources of encoder-decoders do. Raises `DataError` for an unusable template.
        """
        if template.count(INPUT) != 1:
            raise DataError(
                "wrong template",
                field="template",
                found=repr(template),
                expected=f"exactly one {INPUT}",
            )
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError("the tokenizer has no end-of-text token", field="tokenizer")
        self.template = template
        self.max_tokens = max_tokens
        self.end: int = tokenizer.eos_token_id
        self._closed = closed
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """In the order given. Raises `DataError` naming the first example that is too long."""
        prompts = self.prompt_ids([self.prompt_text(example) for example in examples])
        answers = self._ids([example.output for example in examples], special=False)
        encoded = [Encoded(tuple(p), (*a, self.end)) for p, a in zip(prompts, answers, strict=True)]
        for i, one in enumerate(encoded):
            if len(one) > self.max_tokens or not one.prompt:
                raise DataError(
                    "cannot be encoded",
                    field=f"examples[{i}]",
                    found=f"{len(one)} tokens, {len(one.prompt)} of them prompt, "
                    f"in task {examples[i].task!r}: {examples[i].input[:40]!r}",
                    expected=f"1 to {self.max_tokens} tokens with answer and end-of-text",
                )
        return encoded

    def prompt_text(self, example: Example) -> str:
        """What the backbone reads before it answers."""
        if example.messages is None:
            return self.template.replace(INPUT, example.input)
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # templates raise whatever they like
            raise DataError(
                f"the chat template refused the messages: {exc}", field="messages"
            ) from exc
        return str(rendered)

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """What the backbone is given for each of these texts."""
        return self._ids(texts, special=self._closed)

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        found = self._fast.encode_batch_fast(list(texts), add_special_tokens=special)
        return [one.ids for one in found]


@dataclass(frozen=True, eq=False)
class TrainingBatch(AnswersBatch):
    """N tokens of E examples of U tasks, all in one row. Tasks are slices of it.

    Logits are needed at P places only: those from which an answer token is predicted.
    For attention the examples stand in R short rows of L places.
    """

    input_ids: Tensor  # [1, N] long
    position_ids: Tensor  # [1, N] long, from 0 in every example
    segment: Tensor  # [N] long: which example a token belongs to
    counts: tuple[int, ...]  # [U]: how many tokens each of the tasks has, in their order
    predict_at: Tensor  # [P] long, into the N tokens
    places: Tensor  # [N] long: where a token stands in the flattened [R * L]
    rows: tuple[int, int]  # R, L

    @property
    def tokens(self) -> int:
        """N."""
        return self.input_ids.shape[1]

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """`[1, 1, N, N]`, added to attention scores: 0 where a token may look."""
        return _blocks(self.segment.unsqueeze(0), dtype, window)

    def row_mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """`[R, 1, L, L]`: the same for the short rows; made once for each window."""
        key = (dtype, window)
        if key not in self._row_masks:
            empty = self.segment.new_full((self.rows[0] * self.rows[1],), -1)
            laid_out = empty.index_copy(0, self.places, self.segment).view(self.rows)
            self._row_masks[key] = _blocks(laid_out, dtype, window)
        return self._row_masks[key]

    @cached_property
    def _row_masks(self) -> dict[tuple[torch.dtype, int | None], Tensor]:
        return {}


def _blocks(segment: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
    """segment `[R, L]` to a causal mask `[R, 1, L, L]` within equal segments.

    Empty places look at empty places, for a token that sees nothing would get NaN.
    """
    place = torch.arange(segment.shape[1], device=segment.device)
    back = place[:, None] - place[None]
    seen = (segment[:, :, None] == segment[:, None]) & (back >= 0)
    if window is not None:
        seen &= back < window
    return masked_but(seen, dtype)


def pack(encoded: Sequence[Encoded], example_task: Sequence[int]) -> TrainingBatch:
    """All examples in one row. example_task: the number of each example's task.

    Raises `DataError` when there are no examples or not as many task numbers.
    """
    order = task_order(encoded, example_task)
    lengths = [len(encoded[i]) for i in order]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    begins = [start + len(encoded[i].prompt) - 1 for start, i in zip(starts, order, strict=True)]
    predict = [
        begin + k
        for begin, i in zip(begins, order, strict=True)
        for k in range(len(encoded[i].answer))
    ]
    places, rows = _lay_out(lengths)
    return TrainingBatch(
        **answers_of(encoded, example_task, order),
        input_ids=torch.tensor([[t for i in order for t in encoded[i].prompt + encoded[i].answer]]),
        position_ids=torch.tensor([[p for length in lengths for p in range(length)]]),
        segment=torch.tensor([i for i in order for _ in range(len(encoded[i]))]),
        counts=task_counts(order, example_task, lengths),
        predict_at=torch.tensor(predict),
        places=torch.tensor(places),
        rows=rows,
    )


def _lay_out(lengths: Sequence[int]) -> tuple[list[int], tuple[int, int]]:
    """First-fit-decreasing: where each token stands in `[R * L]`, and R, L."""
    limit = max(max(lengths), SHORT_ROW)
    room: list[int] = []
    start: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(room))
        if row == len(room):
            room.append(limit)
        start[i] = (row, limit - room[row])
        room[row] -= lengths[i]
    longest = limit - min(room)
    places = [
        start[i][0] * longest + start[i][1] + k
        for i, length in enumerate(lengths)
        for k in range(length)
    ]
    return places, (len(room), longest)
