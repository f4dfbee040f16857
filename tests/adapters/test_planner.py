"""A planner that has been through many steps plans like one that has just been made."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from factories import random_private, random_task, tiny_inventory, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import COMBINED, FACTORED, FORMS, deltas
from torch import Tensor

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.errors import PlanError
from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, GroupSlot, Plan, RoutedTask
from polyhead.adapters.planner import Planner
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.weight_board import WeightBoard

HEADS, SKILLS, RANK = 4, 4, 3
EXACT = 1e-5
DIFFERENT = 0.1
CPU = torch.device("cpu")


@cache
def parts() -> tuple[Inventory, Sequence[GroupSlot], list[list[str]]]:
    """An inventory, packed in the groups that an injection finds: q k v, o, gate up, down."""
    model = tiny_model(num_hidden_layers=1)
    inventory = tiny_inventory(model, HEADS, SKILLS, RANK)
    names = list(inventory.layout.modules)
    slots = inject(model, inventory).slots
    sizes = [slot.group.size for slot in slots]
    assert sizes == [3, 1, 2, 1]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    members = [names[start : start + n] for start, n in zip(starts, sizes, strict=True)]
    return inventory, slots, members


def planner(costs: FormCosts = FACTORED, **options: int) -> Planner:
    inventory, slots, members = parts()
    order = range(len(inventory.layout.modules))
    return Planner(slots, members, order, torch.device("cpu"), costs=costs, **options)


@cache
def adapters() -> list[Adapter]:
    inventory = parts()[0]
    tasks = [random_task(inventory, f"task-{i}", i) for i in range(6)]
    return [None, *tasks, random_private(inventory, 0), random_private(inventory, 1)]


def input_of(slot: GroupSlot, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(slot.index)
    width = slot.group.a.shape[0] * slot.group.a.shape[1]
    return torch.randn(tokens, width, generator=generator)


def outputs(plan: Plan) -> list[Tensor]:
    """What the plan adds to every module, in the order of groups, for fixed inputs."""
    found = []
    for slot in parts()[1]:
        x = input_of(slot, plan.tokens)
        for g, b in enumerate(slot.group.b):
            y = torch.zeros(plan.tokens, b.shape[0] * b.shape[2])
            plan.add_delta(slot, g, x, y)
            found.append(y)
    return found


@cache
def delta_of(adapter: Adapter) -> dict[str, Tensor]:
    found = deltas(parts()[0], adapter)
    return {name: delta.float() for name, delta in found.items()}


def expected(rows: Sequence[Adapter], counts: Sequence[int]) -> list[Tensor]:
    """The same, token by token, from each adapter's merged `[I, O]` matrices."""
    inventory, slots, members = parts()
    widths = {m.name: m.out_features for m in inventory.header.modules}
    tokens = [a for a, n in zip(rows, counts, strict=True) for _ in range(n)]
    found = []
    for slot, names in zip(slots, members, strict=True):
        x = input_of(slot, len(tokens))
        for name in names:
            bare = torch.zeros(x.shape[1], widths[name])
            pairs = zip(x, tokens, strict=True)
            found.append(torch.stack([t @ delta_of(a).get(name, bare) for t, a in pairs]))
    return found


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(bool((y - e).norm() <= EXACT * (1 + e.norm())) for y, e in pairs)


COUNTS = st.sampled_from([1, 1, 1, 2, 5, 15, 16, 40])
ROWS = st.lists(st.tuples(st.integers(0, 8), COUNTS), min_size=1, max_size=8)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(ROWS, min_size=2, max_size=6))
def test_any_sequence_of_steps(form: str, steps: list[list[tuple[int, int]]]) -> None:
    used = planner(FORMS[form])
    for step in steps:
        rows = [adapters()[i] for i, _ in step]
        counts = [n for _, n in step]
        assert same(outputs(used.build(rows, counts)), expected(rows, counts))


def test_the_next_adapter_would_be_noticed() -> None:
    """Control of the test above."""
    for adapter in adapters():
        wanted = expected([adapter], [2])
        for other in adapters():
            assert same(outputs(planner().build([other], [2])), wanted) == (other is adapter)


@pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
def test_rows_join_leave_and_change_places(costs: FormCosts) -> None:
    """As an engine sees them: a batch that changes a little from step to step, bit by bit as
    a new planner would have it."""
    draw = random.Random(1)
    used, batch = planner(costs), list(range(1, 5))
    for _ in range(40):
        change = draw.choice(["join", "leave", "swap", "replace", "nothing"])
        if change == "join" and len(batch) < 12:
            batch.insert(draw.randint(0, len(batch)), draw.randrange(len(adapters())))
        elif change == "leave" and len(batch) > 1:
            del batch[draw.randrange(len(batch))]
        elif change == "swap":
            draw.shuffle(batch)
        elif change == "replace":
            batch[draw.randrange(len(batch))] = draw.randrange(len(adapters()))
        rows, counts = [adapters()[i] for i in batch], [1] * len(batch)
        fresh = planner(costs)
        for _ in batch:  # so that both have built the factors that they want
            used.build(rows, counts)
            fresh.build(rows, counts)
        ours, theirs = (outputs(p.build(rows, counts)) for p in (used, fresh))
        assert all(map(torch.equal, ours, theirs))


def test_a_new_generation_replaces_the_old_one() -> None:
    old = adapters()[1]
    assert isinstance(old, RoutedTask)
    new = replace(old, key="task-1, next generation", weights=old.weights.flip(-1))
    for costs in FORMS.values():
        used = planner(costs)
        for rows in ([old, old], [old, new], [new, old], [new, new]):
            assert same(outputs(used.build(rows, [5, 1])), expected(rows, [5, 1]))


@pytest.mark.parametrize("counts", [[0], [1, 0], [-1, 2]])
def test_a_row_without_tokens_is_refused(counts: list[int]) -> None:
    with pytest.raises(PlanError, match=f"expected at least 1; found {min(counts)}"):
        planner().build(adapters()[1 : len(counts) + 1], counts)


class TestStalePlan:
    """The factored tokens' weights lie in one buffer that the next plan writes to."""

    def test_it_is_refused_once_a_later_one_has_its_buffer(self) -> None:
        used = planner()
        first = used.build(adapters()[1:3], [1, 1])
        before = outputs(first)
        second = used.build(adapters()[2:4], [1, 1])
        with pytest.raises(PlanError, match="later plan"):
            outputs(first)
        assert not same(outputs(second), before)
        assert same(outputs(used.build(adapters()[1:3], [1, 1])), before)

    def test_it_stays_good_while_nothing_was_overwritten(self) -> None:
        used = planner()
        first = used.build(adapters()[1:3], [1, 1])
        before = outputs(first)
        used.build([None, adapters()[-1]], [1, 1])
        combined = planner(COMBINED)
        plans = [combined.build([a], [1]) for a in adapters()[1:3]]
        assert same(outputs(first), before)
        for plan, adapter in zip(plans, adapters()[1:3], strict=True):
            assert same(outputs(plan), expected([adapter], [1]))

    def test_it_can_be_used_many_times_until_then(self) -> None:
        plan = planner().build(adapters()[1:3], [2, 1])
        assert same(outputs(plan), outputs(plan))


@pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
def test_inference_mode_may_come_and_go(costs: FormCosts) -> None:
    used = planner(costs)
    for size in (2, 2, 4):  # the board grows inside and outside
        for inside in (True, False, True):
            rows, counts = adapters()[1 : size + 1], [1] * size
            rows = rows[::-1] if inside else rows
            with torch.inference_mode(inside):
                assert same(outputs(used.build(rows, counts)), expected(rows, counts))


def test_a_failed_update_leaves_no_wrong_weights_behind() -> None:
    used = planner()
    good = adapters()[1:4]
    assert isinstance(good[0], RoutedTask)
    broken = replace(good[0], key="broken", weights=good[0].weights[:, :2])
    used.build(good[:2], [1, 1])
    for _ in range(2):  # it must not pass for resident the second time
        with pytest.raises(RuntimeError):
            used.build([broken, good[2]], [1, 1])
    rows = [good[0], good[2]]  # the second row is as the failed update wanted it
    assert same(outputs(used.build(rows, [1, 1])), expected(rows, [1, 1]))


class TestFactorCache:
    def build(self, used: Planner, index: int) -> object:
        return used.build([adapters()[index]], [1]).combined[0].factors

    def test_factors_are_kept_while_they_fit(self) -> None:
        used = planner(COMBINED)
        kept = {i: self.build(used, i) for i in range(1, 9)}
        assert all(self.build(used, i) is factors for i, factors in kept.items())

    def test_the_least_recently_used_go_first(self) -> None:
        one = planner(COMBINED).build([adapters()[1]], [1]).combined[0].factors
        size = sum(f.nbytes for f in one if f is not None)
        used = planner(COMBINED, factor_cache_bytes=2 * size)
        first, second = self.build(used, 1), self.build(used, 2)
        assert self.build(used, 1) is first
        self.build(used, 3)
        assert self.build(used, 1) is first
        assert self.build(used, 2) is not second

    def test_what_a_step_needs_stays_even_beyond_the_limit(self) -> None:
        used = planner(COMBINED, factor_cache_bytes=0)
        rows, counts = adapters()[1:], [1] * 8
        for _ in rows:
            plan = used.build(rows, counts)
            assert same(outputs(plan), expected(rows, counts))
        again = used.build(rows, counts)
        kept = zip(plan.combined, again.combined, strict=True)
        assert all(old.factors is new.factors for old, new in kept)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_prepared_adapter_is_the_one_it_was_made_of(compiled: bool) -> None:
    used = planner()
    if not compiled:
        used._kernels = None
        used._board = WeightBoard(HEADS, RANK, parts()[1][-1].columns.stop, used._order, CPU)
    rows = [adapters()[1], *adapters()[-2:]]
    prepared = [used.prepare(a) if isinstance(a, PrivateAdapter) else a for a in rows]
    plain = outputs(used.build(rows, [2, 3, 1]))
    for found, wanted in zip(outputs(used.build(prepared, [2, 3, 1])), plain, strict=True):
        assert torch.equal(found, wanted)
    turned = [prepared[0], prepared[2], prepared[1]]
    others = outputs(used.build(turned, [2, 3, 1]))
    assert (
        max((found - wanted).abs().max() for found, wanted in zip(others, plain, strict=True))
        > DIFFERENT
    )


def test_a_prepared_adapter_takes_none_of_the_planners_own_memory() -> None:
    used = planner()
    private = [a for a in adapters() if isinstance(a, PrivateAdapter)]
    used.build([used.prepare(a) for a in private], [1] * len(private))
    assert not used._factors
    used.build(private, [1] * len(private))  # a control: one that nobody prepared is kept
    assert len(used._factors) == len(private)
