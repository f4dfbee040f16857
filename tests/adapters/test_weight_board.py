"""Boards hold what their last update asked for, whatever they held before."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.plan import RoutedTask
from polyhead.adapters.weight_board import PlainBoard, WeightBoard

MODULES, HEADS, SKILLS, RANK = 5, 2, 3, 2
ORDER = torch.tensor([2, 0, 1, 4, 3])


def routed(number: int) -> RoutedTask | None:
    if number == 0:
        return None
    draw = torch.Generator().manual_seed(number)
    weights = torch.rand(MODULES, HEADS, SKILLS, generator=draw).softmax(-1)
    return RoutedTask(f"task-{number}", weights)


def spread(weights: Tensor) -> Tensor:
    return ops.spread(weights, RANK)


def plain(weights: Tensor) -> Tensor:
    return weights


@pytest.mark.parametrize(("kind", "arranged"), [(WeightBoard, spread), (PlainBoard, plain)])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), max_size=8))
def test_the_board_holds_exactly_the_rows_of_the_last_update(
    kind: type[WeightBoard], arranged: Callable[[Tensor], Tensor], steps: list[list[int]]
) -> None:
    board = kind(HEADS, RANK, MODULES * SKILLS * RANK, ORDER, torch.device("cpu"))
    for step in steps:
        tasks = [routed(number) for number in step]
        found = board.update(tasks)
        assert len(found) == len(tasks)
        for row, task in zip(found, tasks, strict=True):
            wanted = torch.zeros_like(row) if task is None else arranged(task.weights[ORDER])
            assert torch.equal(row, wanted)
