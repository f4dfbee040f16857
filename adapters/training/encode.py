"""From examples to padded batches of tokens, several examples of one task in a row.

Packing is exact: a token sees only the tokens before it in its own example, and positions start
again with every example, so each example's loss is what it would be alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from polyhead.adapters.training.data import Example
from polyhead.adapters.training.errors import DataError

INPUT = "{input}"
DEFAULT_TEMPLATE = "{input}\n"


@dataclass(frozen=True)
class Encoded:
    """One example's tokens: what the backbone is given, and what it should go on with."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # the end-of-text token is its last one

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Turns examples into tokens as serving does: the filled template is encoded alone, with no
    special tokens added, and the answer is encoded apart from it and closed by end-of-text."""

    def __init__(
        self, tokenizer: Any, template: str = DEFAULT_TEMPLATE, max_tokens: int = 512
    ) -> None:
        """tokenizer: a transformers fast tokenizer. Raises `DataError` for an unusable template."""
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
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """In the order given. Raises `DataError` naming the first example that is too long."""
        prompts = self._ids([self.prompt_text(example) for example in examples])
        answers = self._ids([example.output for example in examples])
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

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """B rows of L tokens that hold E examples; a row belongs to one task.

    Logits are needed at P places only: those from which an answer token is predicted.
    """

    input_ids: Tensor  # [B, L] long
    position_ids: Tensor  # [B, L] long, from 0 in every example
    segment: Tensor  # [B, L] long: which example a token belongs to, -1 for padding
    row_task: Tensor  # [B] long
    tasks: Tensor  # [U] long: the distinct tasks of the rows
    row_slot: Tensor  # [B] long: where in `tasks` a row's task stands
    predict_at: Tensor  # [P] long, into the flattened [B * L]
    gold: Tensor  # [P] long: the answer token that should come next
    example_of: Tensor  # [P] long: whose answer it belongs to
    answer_tokens: Tensor  # [E] long: how many tokens each answer has
    example_task: tuple[int, ...]  # task of each example, in the order they were given

    @property
    def examples(self) -> int:
        """E."""
        return len(self.example_task)

    @cached_property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segment >= 0).sum())

    def mask(self, dtype: torch.dtype) -> Tensor:
        """`[B, 1, L, L]`, added to the attention scores: 0 where a token may look."""
        same = self.segment.unsqueeze(2) == self.segment.unsqueeze(1)
        # Padding looks at padding, so that no row of the mask is empty: that would give NaN.
        seen = (same & torch.ones_like(same[0]).tril()).unsqueeze(1)
        blank = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return blank.masked_fill_(~seen, torch.finfo(dtype).min)

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """The same batch on another device."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name in type(self).__dataclass_fields__
        }
        return TrainingBatch(**moved, example_task=self.example_task)


def pack(
    encoded: Sequence[Encoded],
    example_task: Sequence[int],
    row_tokens: int | None = None,
    pad: int = 0,
) -> TrainingBatch:
    """Rows of examples of the same task, first-fit-decreasing.

    example_task: the number of each example's task. row_tokens: L; None picks the one that
    leaves the fewest places empty. Raises `DataError` when an example is longer than a row.
    """
    if not encoded or len(encoded) != len(example_task):
        raise DataError(
            "wrong number of examples",
            field="example_task",
            found=str(len(example_task)),
            expected=str(max(1, len(encoded))),
        )
    longest = max(len(one) for one in encoded)
    if row_tokens is not None and longest > row_tokens:
        raise DataError(
            "longer than a row", found=f"{longest} tokens", expected=f"at most {row_tokens}"
        )
    rows = _tightest(encoded, example_task, row_tokens)
    return _fill(encoded, example_task, rows, pad)


def _tightest(
    encoded: Sequence[Encoded], example_task: Sequence[int], row_tokens: int | None
) -> list[list[int]]:
    """The packing with the smallest padded area among some row lengths; short rows win ties."""
    longest = max(len(one) for one in encoded)
    totals: dict[int, int] = {}
    for one, task in zip(encoded, example_task, strict=True):
        totals[task] = totals.get(task, 0) + len(one)
    candidates = sorted({max(longest, total // k) for total in totals.values() for k in (1, 2, 3)})
    limits = [row_tokens] if row_tokens is not None else candidates
    packings = [_first_fit(encoded, example_task, limit) for limit in limits]
    return min(packings, key=lambda rows: _area(encoded, rows))


def _area(encoded: Sequence[Encoded], rows: list[list[int]]) -> int:
    return len(rows) * max(sum(len(encoded[i]) for i in row) for row in rows)


def _first_fit(
    encoded: Sequence[Encoded], example_task: Sequence[int], limit: int
) -> list[list[int]]:
    """Rows of indices into `encoded`, each of one task and of at most `limit` tokens."""
    rows: dict[int, list[list[int]]] = {}
    room: dict[int, list[int]] = {}
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
        own, left = rows.setdefault(example_task[i], []), room.setdefault(example_task[i], [])
        fit = next((k for k, free in enumerate(left) if free >= len(encoded[i])), None)
        if fit is None:
            own.append([])
            left.append(limit)
            fit = len(own) - 1
        own[fit].append(i)
        left[fit] -= len(encoded[i])
    return [row for task in sorted(rows) for row in rows[task]]


def _fill(
    encoded: Sequence[Encoded], example_task: Sequence[int], rows: list[list[int]], pad: int
) -> TrainingBatch:
    length = max(sum(len(encoded[i]) for i in row) for row in rows)
    ids, positions, segment = [], [], []
    predict_at: list[int] = []
    gold: list[int] = []
    example_of: list[int] = []
    for b, row in enumerate(rows):
        start = b * length
        for i in row:
            one = encoded[i]
            answer_from = start + len(one.prompt) - 1
            predict_at.extend(range(answer_from, answer_from + len(one.answer)))
            gold.extend(one.answer)
            example_of.extend([i] * len(one.answer))
            start += len(one)
        empty = length - sum(len(encoded[i]) for i in row)
        ids.append(
            [t for i in row for t in (*encoded[i].prompt, *encoded[i].answer)] + [pad] * empty
        )
        positions.append([p for i in row for p in range(len(encoded[i]))] + list(range(empty)))
        segment.append([i for i in row for _ in range(len(encoded[i]))] + [-1] * empty)
    row_task = [example_task[row[0]] for row in rows]
    tasks = sorted(set(row_task))
    slot = {task: k for k, task in enumerate(tasks)}
    return TrainingBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        segment=torch.tensor(segment),
        row_task=torch.tensor(row_task),
        tasks=torch.tensor(tasks),
        row_slot=torch.tensor([slot[task] for task in row_task]),
        predict_at=torch.tensor(predict_at),
        gold=torch.tensor(gold),
        example_of=torch.tensor(example_of),
        answer_tokens=torch.tensor([len(one.answer) for one in encoded]),
        example_task=tuple(example_task),
    )
