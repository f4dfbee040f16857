"""What every batch has, whatever its backbone: tasks, and the answer tokens to predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from polyhead.adapters.training.errors import DataError

Moved = TypeVar("Moved")


@dataclass(frozen=True)
class Encoded:
    """One example's tokens: what the backbone is given, and what it should go on with."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # the end-of-text token is its last one

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, eq=False)
class AnswersBatch:
    """E examples of U tasks, in the order of the tasks, with P answer tokens in all."""

    tasks: Tensor  # [U] long, ascending: the distinct tasks
    gold: Tensor  # [P] long: the answers' tokens, example after example
    example_of: Tensor  # [P] long: whose answer each belongs to
    answer_tokens: Tensor  # [E] long: how many tokens each answer has
    example_task: tuple[int, ...]  # [E]: task of each example, in the order they were given

    @property
    def examples(self) -> int:
        """E."""
        return len(self.example_task)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return _moved(self, device)


def _moved(batch: Moved, device: torch.device | str) -> Moved:
    """A batch, or a part of one, with all of its tensors."""
    found: dict[str, Any] = {}
    for field in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.to(device)
        elif is_dataclass(value):
            found[field.name] = _moved(value, device)
    return replace(batch, **found)  # type: ignore[type-var]


def task_order(encoded: Sequence[Encoded], example_task: Sequence[int]) -> list[int]:
    """The examples in the order of their tasks, so that a task's tokens are one slice.

    Raises `DataError` when there are no examples or not as many task numbers.
    """
    if not encoded or len(encoded) != len(example_task):
        raise DataError(
            "wrong number of examples",
            field="example_task",
            found=str(len(example_task)),
            expected=str(max(1, len(encoded))),
        )
    return sorted(range(len(encoded)), key=lambda i: example_task[i])


def task_counts(
    order: Sequence[int], example_task: Sequence[int], lengths: Sequence[int]
) -> tuple[int, ...]:
    """`[U]`: how many tokens each task has; lengths of the examples as `order` has them."""
    counts = dict.fromkeys((example_task[i] for i in order), 0)
    for i, length in zip(order, lengths, strict=True):
        counts[example_task[i]] += length
    return tuple(counts.values())


def answers_of(
    encoded: Sequence[Encoded], example_task: Sequence[int], order: Sequence[int]
) -> dict[str, Any]:
    """The fields of an `AnswersBatch`."""
    return {
        "tasks": torch.tensor(sorted(set(example_task))),
        "gold": torch.tensor([token for i in order for token in encoded[i].answer]),
        "example_of": torch.tensor([i for i in order for _ in encoded[i].answer]),
        "answer_tokens": torch.tensor([len(one.answer) for one in encoded]),
        "example_task": tuple(example_task),
    }


def masked_but(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """seen `[R, Q, K]` to what is added to attention scores `[R, 1, Q, K]`: 0 where seen."""
    blank = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return blank.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def micro_batches(
    work: Mapping[int, Sequence[Encoded]], tokens: int
) -> list[list[tuple[int, Encoded]]]:
    """Pairs of learner and example in parts of at most about `tokens`, learners kept whole where
    they fit; an example longer than that is a part by itself."""
    parts: list[list[tuple[int, Encoded]]] = [[]]
    used = 0
    for learner, examples in work.items():
        size = sum(map(len, examples))
        if used and used + size > tokens:
            parts.append([])
            used = 0
        for example in examples:
            if used and used + len(example) > tokens:
                parts.append([])
                used = 0
            parts[-1].append((learner, example))
            used += len(example)
    return [part for part in parts if part]
