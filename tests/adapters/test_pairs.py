"""The kernels for pairs of bfloat16 numbers, against the float32 reference."""

import random

import pytest
import torch
from factories import random_private, random_task, tiny_inventory, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import FORMS, distance
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable, compiled_for, skill_dtype
from polyhead.adapters.cpu_pair_tiles import pairs_supported
from polyhead.adapters.inject import inject
from polyhead.adapters.pairs import (
    PairedCombined,
    PairedFactored,
    PairedFactors,
    PairedSkills,
    PairedStep,
    group_suits,
    header_suits,
    paired,
)
from polyhead.adapters.plan import Adapter, use_plan

pytestmark = pytest.mark.skipif(
    not pairs_supported(), reason="this CPU does not multiply pairs of bfloat16 (AVX512-BF16)"
)
BF16, CPU = torch.bfloat16, torch.device("cpu")
ROUNDED = 0.01
"""What rounding the low-rank activations and each head's sum may cost."""
WRONG = 0.3
RANKS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), min_size=2, max_size=5)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def test_pairs_are_rows_side_by_side() -> None:
    matrix = torch.arange(12.0).view(4, 3)
    assert paired(matrix).tolist() == [
        [[0, 3], [1, 4], [2, 5]],
        [[6, 9], [7, 10], [8, 11]],
    ]


def combined_errors(ranks: list[tuple[int, int]], shape: tuple[int, int], turn: int) -> list[float]:
    """Of each module of a group of two, when every token gets the factors of the task `turn`
    further; ranks: of each task, in both modules."""
    width, out = shape
    draw = random.Random(width + out)
    factors: list[ops.Factors | None] = []
    for task, own in enumerate(ranks):
        b = [normal(r, out, seed=9 * task + r) if r else None for r in own]
        a = normal(width, sum(own), seed=task) / width**0.5
        factors.append(ops.Factors(a, tuple(b)) if sum(own) else None)
    owners = [task for task in range(len(ranks)) for _ in range(draw.choice([1, 2, 4, 13]))]
    draw.shuffle(owners)
    places = [[p for p, own in enumerate(owners) if own == task] for task in range(len(ranks))]
    x, errors = normal(len(owners), width, seed=1), []
    laid = [None if own is None else PairedFactors.of(own) for own in factors]
    tables = [FactorTable.of([own], [2]) for own in laid]
    kernel = PairedCombined(len(x), tables, places[turn:] + places[:turn])
    hidden = kernel.shrink(0, x)
    for g in range(2):
        found, expected = torch.zeros(len(x), out, dtype=BF16), torch.zeros(len(x), out)
        kernel.expand(g, hidden, found)
        for own, rows in zip(factors, places, strict=True):
            if own is not None and own.b[g] is not None:
                start = ranks[places.index(rows)][0] if g else 0
                b = own.b[g].float()  # type: ignore[union-attr]
                a = own.a[:, start : start + len(b)].float()
                expected[rows] = x[rows].float() @ a @ b
        errors.append(distance(found, expected) if expected.any() else float(found.abs().max()))
    return errors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ranks=RANKS, width=st.integers(1, 40), out=st.integers(1, 12))
@example(ranks=[(8, 8), (16, 16)], width=288, out=192)
def test_combined_tasks_of_any_ranks(ranks: list[tuple[int, int]], width: int, out: int) -> None:
    assert max(combined_errors(ranks, (2 * width, 8 * out), 0)) < ROUNDED


def test_another_tasks_factors_are_told_apart() -> None:
    """Control of the test above."""
    for ranks in ([(3, 8), (16, 2), (9, 1)], [(8, 8), (8, 8)]):
        assert min(combined_errors(ranks, (48, 40), 1)) > WRONG


def factored_errors(
    shape: tuple[int, int, int, int], tokens: int, own: Tensor, shift: int
) -> list[float]:
    """Of each module of a group of three, when each of the tokens `own` gets the weights of the
    task `shift` further; shape: heads, skills, rank, input features of a head."""
    heads, skills, rank, inner = shape
    outs = [8, 16, 72]
    a = [normal(heads, skills, inner, rank, seed=g) for g in range(3)]
    b = [normal(heads, skills, rank, out, seed=9 + g) for g, out in enumerate(outs)]
    group = ops.SkillGroup.pack(a, b, 1.0, BF16)
    assert group_suits(group)
    x, laid = normal(tokens, heads * inner, seed=5), PairedSkills.of(group)
    weights = torch.softmax(8 * normal(7, 3, heads, skills, seed=6).float(), -1)
    everything = slice(0, len(own))
    places = own if len(own) < tokens else slice(0, tokens)
    kernel = PairedFactored.of(places, weights[(own + shift) % 7], [(everything, everything)])
    mixed, errors = kernel.shrink(laid.a, 3, rank, 0, x), []
    for g, (a_g, b_g) in enumerate(zip(a, b, strict=True)):
        found = torch.zeros(tokens, heads * outs[g], dtype=BF16)
        kernel.expand(laid.b[g], g, g, mixed, found)
        expected = torch.zeros(found.shape)
        expected[own] = ops.reference(x[own], a_g, b_g, weights[own % 7, g], 1.0)
        errors.append(distance(found, expected))
    return errors


WHOLE = st.tuples(st.integers(1, 16), st.integers(1, 64)).filter(lambda sr: not sr[0] * sr[1] % 8)
"""Skills and ranks that fill whole vectors."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 3, 8, 64]),
    skills_rank=WHOLE,
    pairs=st.integers(1, 12),
    tokens=st.integers(1, 140),
    every=st.integers(1, 3),
)
@example(heads=8, skills_rank=(8, 8), pairs=36, tokens=64, every=1)
@example(heads=64, skills_rank=(8, 1), pairs=4, tokens=50, every=2)
def test_the_factored_kernel_is_the_reference(
    heads: int, skills_rank: tuple[int, int], pairs: int, tokens: int, every: int
) -> None:
    own = torch.arange(0, tokens, every)
    assert max(factored_errors((heads, *skills_rank, 2 * pairs), tokens, own, 0)) < ROUNDED


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8, 8, 72), (1, 4, 2, 2), (64, 8, 1, 8), (2, 3, 8, 6)])
def test_another_tasks_weights_are_told_apart(shape: tuple[int, int, int, int], every: int) -> None:
    """Control of the test above."""
    assert min(factored_errors(shape, 9, torch.arange(0, 9, every), 1)) > WRONG


@pytest.mark.parametrize(("skills", "rank"), [(8, 8), (4, 4), (2, 12)])
def test_factors_are_folded_as_torch_folds_them(skills: int, rank: int) -> None:
    heads, outs = 4, [8, 24, 72]
    a = [normal(heads, skills, 6, rank, seed=g) for g in range(3)]
    b = [normal(heads, skills, rank, out, seed=9 + g) for g, out in enumerate(outs)]
    group = ops.SkillGroup.pack(a, b, 1.0, BF16)
    weights = torch.softmax(4 * normal(2, 3, heads, skills, seed=1).float(), -1)
    expected = PairedFactors.of(ops.fold_factors(group, weights[0]))
    for task in range(2):
        found = PairedSkills.of(group).fold(weights[task], rank)
        assert found.ranks == expected.ranks == [rank] * 3
        assert found.a.shape == expected.a.shape
        pairs = zip((found.a, *found.b), (expected.a, *expected.b), strict=True)
        errors = [distance(ours, theirs) for ours, theirs in pairs]  # type: ignore[arg-type]
        assert max(errors) < ROUNDED if task == 0 else min(errors) > WRONG


def test_paired_factors_can_be_read_plainly() -> None:
    factors = ops.Factors(normal(6, 3, seed=0), (normal(1, 8, seed=1), None, normal(2, 16, seed=2)))
    plain = PairedFactors.of(factors).plain()
    x, y = normal(5, 6, seed=3), torch.zeros(5, 16, dtype=BF16)
    again = y.clone()
    ops.combined_expand(y, ops.combined_shrink(x, factors), factors, 2)
    ops.combined_expand(again, ops.combined_shrink(x, plain), plain, 2)
    assert y.any()
    assert torch.equal(y, again)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_a_mixed_batch_is_that_of_torch(form: str) -> None:
    """Routed tasks, a private adapter and bare rows, through a whole model."""
    logits: dict[str, Tensor] = {}
    for name, threads in (("pairs", 1), ("torch", 3), ("turned", 1)):
        torch.set_num_threads(threads)
        model = tiny_model(hidden_size=128, intermediate_size=256).to(BF16)
        inventory = tiny_inventory(model, heads=4, skills=4, rank=2)
        assert header_suits(inventory.header)
        injection = inject(model, inventory)
        injection.planner.costs = FORMS[form]
        tasks = [random_task(inventory, f"{i}", i) for i in range(3)]
        rows: list[Adapter] = [*tasks, random_private(inventory, 9), None]
        rows = rows[::-1] if name == "turned" else rows
        plan = injection.plan(rows, [1, 2, 20, 5, 3])
        assert isinstance(plan.step, PairedStep) == (name != "torch")
        with torch.inference_mode(), use_plan(plan):
            logits[name] = model(torch.arange(31)[None] * 7 % 250).logits[0].float()
    torch.set_num_threads(1)
    assert distance(logits["pairs"], logits["torch"]) < 0.05
    assert distance(logits["turned"], logits["torch"]) > WRONG


def test_shapes_that_do_not_come_in_pairs_are_widened() -> None:
    model = tiny_model().to(BF16)
    odd = tiny_inventory(model, heads=4, skills=4, rank=3)  # 12 columns a head
    assert not header_suits(odd.header)
    assert skill_dtype(BF16, CPU, header_suits(odd.header)) == torch.float32
    assert inject(model, odd).slots[0].group.a.dtype == torch.float32


def test_float32_backbones_keep_float32() -> None:
    assert skill_dtype(torch.float32, CPU, True) == torch.float32
    assert compiled_for(BF16, CPU)
    assert skill_dtype(BF16, CPU, True) == BF16
