from dataclasses import replace

import pytest
import torch
from oracles import COMBINED, FACTORED, distance
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyhead.adapters import ops
from polyhead.adapters.costs import FormCosts
from polyhead.adapters.errors import PlanError
from polyhead.adapters.layers import RoutedLinear
from polyhead.adapters.plan import GroupSlot, Plan, RoutedTask, use_plan
from polyhead.adapters.planner import Planner

HEADS, SKILLS, RANK, WIDTH = 4, 3, 2, 16
EXACT = 1e-5
COSTS = pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
BASES = {
    "linear": lambda: nn.Linear(WIDTH, 8),
    "no bias": lambda: nn.Linear(WIDTH, 8, bias=False),
    "conv1d": lambda: Conv1D(8, WIDTH),
}


class Group:
    """Layers that read one input, as `inject` would wrap them, and their planner."""

    def __init__(self, *bases: nn.Module, costs: FormCosts = FACTORED) -> None:
        generator = torch.Generator().manual_seed(0)
        outs = [int(base(torch.zeros(1, WIDTH)).shape[1]) for base in bases]

        def draw(*shape: int) -> Tensor:
            return torch.randn(HEADS, SKILLS, *shape, generator=generator)

        self.a = [draw(WIDTH // HEADS, RANK) for _ in outs]
        self.b = [draw(RANK, out // HEADS) for out in outs]
        group = ops.SkillGroup.pack(self.a, self.b, 0.5, torch.float32)
        slot = GroupSlot(0, group, slice(0, group.size * group.columns))
        self.layers = [RoutedLinear(base, slot, g) for g, base in enumerate(bases)]
        names = [[str(g) for g in range(len(bases))]]
        self.planner = Planner([slot], names, range(len(bases)), torch.device("cpu"), costs=costs)

    def task(self, seed: int) -> RoutedTask:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(self.layers), HEADS, SKILLS, generator=generator)
        return RoutedTask(f"task-{seed}", torch.softmax(4 * logits, -1))

    def expected(self, g: int, x: Tensor, task: RoutedTask) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights = task.weights[[g] * len(flat)]
        delta = ops.reference(flat, self.a[g], self.b[g], weights, 0.5)
        base: Tensor = self.layers[g].base(x)
        return base + delta.view(base.shape)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BASES)
class TestAnyBase:
    def test_without_a_plan_it_is_the_layer_it_wraps(self, kind: str) -> None:
        base = BASES[kind]()
        layer = Group(base).layers[0]
        assert torch.equal(layer(inputs(2, 3)), base(inputs(2, 3)))
        assert layer.weight is base.weight
        assert layer.bias is base.bias

    @COSTS
    def test_the_delta_is_added_to_the_base(self, kind: str, costs: FormCosts) -> None:
        group = Group(BASES[kind](), costs=costs)
        task, other = group.task(1), group.task(2)
        for shape in [(6,), (1, 6), (2, 3), (1, 2, 3)]:
            x = inputs(*shape)
            with torch.no_grad(), use_plan(group.planner.build([task], [6])):
                y = group.layers[0](x)
            assert y.shape == (*shape, 8)
            assert distance(y, group.expected(0, x, task)) < EXACT
            assert distance(y, group.expected(0, x, other)) > 0.1

    def test_the_input_is_left_alone(self, kind: str) -> None:
        group = Group(BASES[kind]())
        x = inputs(6)
        with torch.no_grad(), use_plan(group.planner.build([group.task(1)], [6])):
            group.layers[0](x)
        assert torch.equal(x, inputs(6))

    def test_another_number_of_tokens_is_refused(self, kind: str) -> None:
        group = Group(BASES[kind]())
        plan = group.planner.build([None, group.task(1)], [1, 1])
        with torch.no_grad(), use_plan(plan), pytest.raises(PlanError, match="expected 2; found 3"):
            group.layers[0](inputs(3))


@COSTS
class TestSharedInput:
    """The shrink product of a group is kept while its layers read the very same tensor."""

    def run(self, group: Group, plan: Plan, calls: list[tuple[int, Tensor]]) -> list[Tensor]:
        with torch.no_grad(), use_plan(plan):
            return [group.layers[g](x) for g, x in calls]

    def test_each_layer_has_its_own_delta(self, costs: FormCosts) -> None:
        """Of its own width and its own part of each task's routing, whoever is called first."""
        group = Group(nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 4), Conv1D(12, WIDTH), costs=costs)
        tasks, x = [group.task(1), group.task(2)], inputs(5)
        for order in ([0, 1, 2], [2, 0, 1], [1]):
            plan = group.planner.build(tasks, [3, 2])
            found = self.run(group, plan, [(g, x) for g in order])
            for g, y in zip(order, found, strict=True):
                for task, rows in zip(tasks, (slice(0, 3), slice(3, 5)), strict=True):
                    assert distance(y[rows], group.expected(g, x[rows], task)) < EXACT
                    shuffled = replace(task, weights=task.weights.roll(1, 0))
                    assert distance(y[rows], group.expected(g, x[rows], shuffled)) > 0.1

    def test_another_input_is_never_taken_for_the_one_before(self, costs: FormCosts) -> None:
        group = Group(nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), costs=costs)
        task = group.task(1)
        x, z = inputs(3), inputs(3, seed=9)
        calls = [(0, x), (1, z), (0, z), (1, x), (1, x.clone()), (0, x)]
        found = self.run(group, group.planner.build([task], [3]), calls)
        for (g, given), y in zip(calls, found, strict=True):
            assert distance(y, group.expected(g, given, task)) < EXACT
        assert distance(found[0], found[2]) > 0.1

    def test_a_view_that_is_not_contiguous(self, costs: FormCosts) -> None:
        group = Group(nn.Linear(WIDTH, 8), costs=costs)
        task, wide = group.task(1), inputs(2, 6)
        x = wide.transpose(0, 1)[::2]  # [3, 2, I]
        assert not x.is_contiguous()
        (y,) = self.run(group, group.planner.build([task], [6]), [(0, x)])
        assert distance(y, group.expected(0, x, task)) < EXACT


@COSTS
def test_gradients_reach_the_input_through_both_products(costs: FormCosts) -> None:
    group = Group(nn.Linear(WIDTH, 8), costs=costs)
    task = group.task(1)
    x, same = inputs(3).requires_grad_(), inputs(3).requires_grad_()
    with use_plan(group.planner.build([task], [3])):
        group.layers[0](x).square().sum().backward()
    group.expected(0, same, task).square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    assert distance(x.grad, same.grad) < EXACT
