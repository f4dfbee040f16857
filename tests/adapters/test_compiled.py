"""The compiled kernels against the float32 reference and against the torch forms."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from factories import random_private, random_task, tiny_inventory, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import FORMS
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import (
    MOST_THREADS,
    CompiledCombined,
    CompiledFactored,
    FactorTable,
    compiled_for,
)
from polyhead.adapters.cpu_pair_tiles import pairs_supported
from polyhead.adapters.inject import inject
from polyhead.adapters.plan import Adapter, GroupSlot, Plan, use_plan
from polyhead.adapters.planner import Planner

EXACT = 1e-5
WRONG = 0.1
RANKS = st.integers(0, 35)  # all tiles: 16 and 8 columns at once, and single ones


def far(found: Tensor, expected: Tensor) -> float:
    """The largest error of a token, relative to the tokens' answers: its own may cancel out."""
    return float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean())


@dataclass(frozen=True)
class Tasks:
    """Tasks of one group of two modules, each with ranks of its own, and tokens for them."""

    factors: list[ops.Factors | None]
    positions: list[list[int]]
    x: Tensor

    @classmethod
    def draw(cls, ranks: list[tuple[int, int]], width: int, out: int, seed: int) -> "Tasks":
        generator = torch.Generator().manual_seed(seed)
        draw = random.Random(seed)
        factors: list[ops.Factors | None] = []
        for own in ranks:
            a = torch.randn(width, sum(own), generator=generator)
            b = [torch.randn(r, out, generator=generator) if r else None for r in own]
            factors.append(ops.Factors(a, tuple(b)) if sum(own) else None)
        owners = [t for t in range(len(ranks)) for _ in range(draw.choice([1, 1, 2, 5, 13]))]
        if draw.random() < 0.5:
            draw.shuffle(owners)
        positions = [[p for p, t in enumerate(owners) if t == own] for own in range(len(ranks))]
        return cls(factors, positions, torch.randn(len(owners), width, generator=generator))

    def expected(self, y: Tensor, g: int) -> Tensor:
        y = y.clone()
        for factors, own in zip(self.factors, self.positions, strict=True):
            if factors is not None:
                part = y[own]
                ops.combined_expand(part, ops.combined_shrink(self.x[own], factors), factors, g)
                y[own] = part
        return y

    def found(self, y: Tensor, g: int, turned: bool = False) -> Tensor:
        positions = self.positions[1:] + self.positions[:1] if turned else self.positions
        tables = [FactorTable.of([factors], [2]) for factors in self.factors]
        kernel = CompiledCombined(len(self.x), tables, positions)
        y = y.clone()
        kernel.expand(g, kernel.shrink(0, self.x), y)
        return y


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.tuples(RANKS, RANKS), min_size=2, max_size=5),
    width=st.integers(1, 40),
    out=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@example(ranks=[(8, 8), (16, 16)], width=576, out=1536, seed=0)
def test_combined_tasks_of_any_ranks(
    ranks: list[tuple[int, int]], width: int, out: int, seed: int
) -> None:
    tasks = Tasks.draw(ranks, width, out, seed)
    y = torch.randn(len(tasks.x), out)
    for g in range(2):
        assert far(tasks.found(y, g), tasks.expected(y, g)) < EXACT


def test_another_tasks_factors_are_told_apart() -> None:
    """Control of the test above."""
    for seed in range(20):
        tasks = Tasks.draw([(3, 8), (16, 2), (9, 1)], 24, 24, seed)
        y = torch.zeros(len(tasks.x), 24)
        assert far(tasks.found(y, 0, turned=True), tasks.expected(y, 0)) > WRONG


def test_tokens_of_no_task_stay_as_they_are() -> None:
    tasks = Tasks.draw([(8, 8), (0, 0), (0, 8)], 24, 24, 0)
    y = torch.randn(len(tasks.x), 24)
    found = tasks.found(y, 0)
    changed = (found != y).any(1).nonzero().squeeze(1).tolist()
    assert changed == tasks.positions[0]


@dataclass(frozen=True)
class Skills:
    a: list[Tensor]
    b: list[Tensor]
    x: Tensor
    weights: Tensor  # [T, G, H, S]
    owners: list[int]

    @classmethod
    def draw(cls, heads: int, skills: int, rank: int, wide: int, tokens: int) -> "Skills":
        generator = torch.Generator().manual_seed(heads * 100 + tokens)
        outs = (wide, wide + 1, 2 * wide)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weights = torch.softmax(4 * normal(5, len(outs), heads, skills), -1)
        weights = weights * (0.5 + torch.rand(5, 1, 1, 1, generator=generator))
        return cls(
            [normal(heads, skills, wide, rank) for _ in outs],
            [normal(heads, skills, rank, out) for out in outs],
            normal(tokens, heads * wide),
            weights,
            [random.Random(i).randrange(5) for i in range(tokens)],
        )

    def errors(self, shift: int = 0) -> list[float]:
        """Of each module, when every token gets the weights of the task `shift` further."""
        group = ops.SkillGroup.pack(self.a, self.b, 0.7, torch.float32)
        weights = self.weights[[(own + shift) % 5 for own in self.owners]]
        n = len(self.owners)
        kernel = CompiledFactored.of(slice(0, n), weights, [(slice(0, n), slice(0, n))])
        mixed, errors = kernel.shrink(group.a, group.size, group.rank, 0, self.x), []
        for g, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            base = torch.randn(n, b.shape[0] * b.shape[3])
            y = base.clone()
            kernel.expand(group.b[g], g, g, mixed, y)
            own = self.weights[self.owners, g]
            errors.append(far(y - base, ops.reference(self.x, a, b, own, 0.7)))
        return errors


SHAPES = [
    (8, 8, 8, 72, 64),
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 3),
    (64, 8, 1, 9, 50),
    (4, 2, 16, 24, 131),
]


@pytest.mark.parametrize(("heads", "skills", "rank", "wide", "tokens"), SHAPES)
def test_the_factored_kernel_is_the_reference(
    heads: int, skills: int, rank: int, wide: int, tokens: int
) -> None:
    drawn = Skills.draw(heads, skills, rank, wide, tokens)
    assert max(drawn.errors()) < 5 * EXACT  # of the delta alone, y's own rounding included
    assert min(drawn.errors(shift=1)) > WRONG


def planners(form: str) -> tuple[list[Planner], list[Adapter], Sequence[GroupSlot]]:
    """One planner that uses the kernels and one that uses torch."""
    model = tiny_model(num_hidden_layers=1)
    inventory = tiny_inventory(model, 4, 4, 3)
    slots = inject(model, inventory).slots
    names = iter(inventory.layout.modules)
    members = [[next(names) for _ in range(slot.group.size)] for slot in slots]
    order, made = range(len(inventory.layout.modules)), []
    for threads in (1, MOST_THREADS + 1):
        torch.set_num_threads(threads)
        made.append(Planner(slots, members, order, torch.device("cpu"), costs=FORMS[form]))
    torch.set_num_threads(1)
    tasks = [random_task(inventory, f"task-{i}", i) for i in range(5)]
    return made, [None, *tasks, random_private(inventory, 0)], slots


def outputs(plan: Plan, slots: Sequence[GroupSlot]) -> list[Tensor]:
    found = []
    for slot in slots:
        x = torch.randn(plan.tokens, 1, generator=torch.Generator().manual_seed(slot.index))
        x = x @ torch.ones(1, slot.group.heads * slot.group.a.shape[1]) + 1
        for g, b in enumerate(slot.group.b):
            y = torch.zeros(plan.tokens, b.shape[0] * b.shape[2])
            plan.add_delta(slot, g, x, y)
            found.append(y)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_plans_are_the_same_with_and_without_kernels(form: str) -> None:
    (compiled, plain), adapters, slots = planners(form)
    draw = random.Random(0)
    for _ in range(30):
        rows = draw.choices(adapters, k=draw.randint(1, 9))
        counts = [draw.choice([1, 1, 2, 20]) for _ in rows]
        ours, theirs = (p.build(rows, counts) for p in (compiled, plain))
        assert theirs.step is None
        assert (ours.step is None) == all(row is None for row in rows)
        pairs = zip(outputs(ours, slots), outputs(theirs, slots), strict=True)
        assert all(bool((a - b).norm() <= EXACT * (1 + b.norm())) for a, b in pairs)


def test_only_few_threads_are_compiled_for() -> None:
    cpu = torch.device("cpu")
    assert compiled_for(torch.float32, cpu)
    assert compiled_for(torch.bfloat16, cpu) == pairs_supported()
    assert not compiled_for(torch.float16, cpu)
    assert not compiled_for(torch.float32, torch.device("meta"))
    torch.set_num_threads(MOST_THREADS + 1)
    assert not compiled_for(torch.float32, cpu)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_kernels_cannot_read_goes_through_torch(form: str) -> None:
    (compiled, _), adapters, slots = planners(form)
    rows = [adapters[1], adapters[-1]]
    compiled.build(rows, [3, 2])
    plan, group = compiled.build(rows, [3, 2]), slots[0].group
    x = torch.randn(5, group.heads * group.a.shape[1])
    plain = torch.zeros(5, group.heads * group.b[0].shape[2])
    turned = torch.zeros(plain.T.shape).T
    with torch.no_grad():
        plan.add_delta(slots[0], 0, x, plain)
        plan.add_delta(slots[0], 0, x, turned)
    x, y = x.clone().requires_grad_(), torch.zeros_like(plain)
    plan.add_delta(slots[0], 0, x, y)
    for found in (turned, y.detach()):
        assert far(found, plain) < EXACT
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum(1).count_nonzero() == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_backbone_gets_deltas_as_exact_as_its_numbers(form: str) -> None:
    """Torch alone, all in bfloat16, is no nearer."""

    def logits(dtype: torch.dtype, threads: int, turned: bool = False) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model = tiny_model().to(dtype)
            inventory = tiny_inventory(model)
            injection = inject(model, inventory)
            injection.planner.costs = FORMS[form]
            tasks: list[Adapter] = [random_task(inventory, f"{i}", i) for i in range(3)]
            adapters = [*tasks, random_private(inventory, 9), None]
            counts = [1, 2, 20, 5, 3]
            ids = torch.arange(sum(counts))[None] * 7 % 250
            plan = injection.plan(adapters[::-1] if turned else adapters, counts)
            assert (plan.step is not None) == (threads <= MOST_THREADS)
            with torch.inference_mode(), use_plan(plan):
                return model(ids).logits[0].float()
        finally:
            torch.set_num_threads(before)

    exact = logits(torch.float32, 1)
    compiled, plain = logits(torch.bfloat16, 1), logits(torch.bfloat16, MOST_THREADS + 1)
    assert far(compiled, exact) < WRONG
    assert far(compiled, exact) < 1.2 * far(plain, exact)
    assert far(logits(torch.bfloat16, 1, turned=True), exact) > 0.3
