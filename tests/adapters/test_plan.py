"""Every row of a mixed batch is answered as if its own adapter were merged into the backbone."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from factories import VOCAB, random_private, random_task, tiny_inventory, tiny_model
from oracles import COMBINED, FACTORED, FORMS, distance, merged
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.errors import PlanError
from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, Plan, RoutedTask, active_plan, adapter_key, use_plan
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing, mix

FAMILIES = ["llama", "gpt2"]
EXACT = 1e-5
"""Both sides are float32; their difference is rounding, carried through two blocks."""
HALF_PRECISION = 0.06
"""The same in bfloat16, whose unit roundoff is 0.004."""
DIFFERENT = 0.2


def inline(inventory: Inventory, seed: int) -> RoutedTask:
    """A routing as a request carries it, with logits so extreme that sigmoids saturate."""
    generator = torch.Generator().manual_seed(seed)
    shape = inventory.layout.shape("block")
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    routing = Routing.from_nested((signs * 1e4).tolist(), inventory.layout, granularity="block")
    return RoutedTask(f"routing:{seed}", routing.weights(inventory.layout))


def uneven_private(inventory: Inventory) -> PrivateAdapter:
    """Another rank in every module, and two of three modules only, groups cut through."""
    generator = torch.Generator().manual_seed(5)
    modules = [m for i, m in enumerate(inventory.header.modules) if i % 3]
    ranks = {m.name: 1 + i % 4 for i, m in enumerate(modules)}
    a = {m.name: torch.randn(m.in_features, ranks[m.name], generator=generator) for m in modules}
    b = {m.name: torch.randn(ranks[m.name], m.out_features, generator=generator) for m in modules}
    return PrivateAdapter.checked(a, b, inventory.header.modules, scaling=0.05)


@dataclass(frozen=True)
class Bench:
    """A backbone, all kinds of adapters for it, and each of them merged into a copy."""

    bare: PreTrainedModel
    inventory: Inventory
    adapters: dict[str, Adapter]
    merged: dict[str, PreTrainedModel]

    def injected(self, costs: FormCosts) -> tuple[PreTrainedModel, Injection]:
        model = merged(self.bare, self.inventory, None)
        return model, inject(model, self.inventory, costs)


@cache
def bench(family: str) -> Bench:
    bare = tiny_model(family)
    inventory = tiny_inventory(bare)
    tasks = [random_task(inventory, f"task-{i}", i) for i in range(3)]
    never = torch.zeros_like(tasks[0].weights)
    adapters: dict[str, Adapter] = {
        "base": None,
        **{task.key: task for task in tasks},
        "mixture": RoutedTask("mixture", mix([(tasks[0].weights, 3.0), (tasks[1].weights, 1.0)])),
        "inline": inline(inventory, 0),
        "no_skill": RoutedTask("no_skill", never),  # what logits of -1e4 everywhere fold to
        "private": random_private(inventory, 0),
        "uneven": uneven_private(inventory),
    }
    models = {name: merged(bare, inventory, adapter) for name, adapter in adapters.items()}
    return Bench(bare, inventory, adapters, models)


@dataclass(frozen=True)
class Row:
    name: str
    ids: Tensor  # [n]


def rows_of(batch: str, seed: int = 0) -> list[Row]:
    """Rows with random tokens; `"task-0*3 base*1"` are one of three tokens and one of one."""
    generator = torch.Generator().manual_seed(seed)
    pairs = (part.split("*") for part in batch.split())
    return [Row(name, torch.randint(0, VOCAB, (int(n),), generator=generator)) for name, n in pairs]


@torch.no_grad()
def packed_logits(model: PreTrainedModel, rows: Sequence[Row]) -> list[Tensor]:
    """All rows as one packed row, each attending to itself only; logits by row `[n, vocab]`."""
    owner = torch.cat([torch.full_like(row.ids, i) for i, row in enumerate(rows)])
    own = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner)).tril().bool()
    mask = torch.zeros(own.shape, dtype=model.dtype).masked_fill(~own, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=torch.cat([row.ids for row in rows])[None],
        position_ids=torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        attention_mask=mask[None, None],
        use_cache=False,
    ).logits[0]
    return list(logits.split([len(row.ids) for row in rows]))


def settled_plan(bench: Bench, injection: Injection, rows: Sequence[Row]) -> Plan:
    """The plan once the planner has built whatever factors it wants for these rows."""
    adapters = [bench.adapters[row.name] for row in rows]
    counts = [len(row.ids) for row in rows]
    for _ in rows:
        injection.plan(adapters, counts)
    return injection.plan(adapters, counts)


def alone(model: PreTrainedModel, row: Row) -> Tensor:
    return packed_logits(model, [row])[0]


EVERYTHING = (
    "task-0*3 private*2 task-1*1 base*4 inline*20 task-0*1 uneven*5 mixture*2 "
    "private*1 task-1*3 base*1 no_skill*2 task-2*1 task-0*2"
)
SPARSE = "task-0*1 base*9 task-1*1 private*8 task-0*2"


class TestMixedBatch:
    @pytest.mark.parametrize("batch", [EVERYTHING, SPARSE], ids=["dense", "sparse"])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_row_equals_its_merged_model_alone(
        self, family: str, form: str, batch: str
    ) -> None:
        b = bench(family)
        model, injection = b.injected(FORMS[form])
        rows = rows_of(batch)
        with use_plan(settled_plan(b, injection, rows)):
            found = packed_logits(model, rows)
        for row, logits in zip(rows, found, strict=True):
            assert distance(logits, alone(b.merged[row.name], row)) < EXACT, row.name
            for name in b.adapters.keys() - {row.name}:
                if {name, row.name} != {"base", "no_skill"}:
                    assert distance(logits, alone(b.merged[name], row)) > DIFFERENT, name

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bare_rows_are_bit_identical(self, family: str, form: str) -> None:
        b = bench(family)
        model, injection = b.injected(FORMS[form])
        rows = rows_of(EVERYTHING)
        bare = packed_logits(b.bare, rows)
        with use_plan(settled_plan(b, injection, rows)):
            found = packed_logits(model, rows)
        for row, logits, expected in zip(rows, found, bare, strict=True):
            assert torch.equal(logits, expected) == (row.name in {"base", "no_skill"}), row.name

    def test_the_forms_are_the_ones_that_were_forced(self) -> None:
        b = bench("llama")
        rows = rows_of(EVERYTHING)
        parts = {}
        for form, costs in FORMS.items():
            plan = settled_plan(b, b.injected(costs)[1], rows)
            parts[form] = (plan.factored is not None, len(plan.combined))
        private, routed = 2, 6
        assert parts["factored"] == (True, private)
        assert parts["combined"] == (False, private + routed)
        assert parts["by length"] == (True, private + 3)  # task-0, task-1 and inline

    def test_factored_tokens_are_gathered_only_where_they_are_sparse(self) -> None:
        b = bench("llama")
        _, injection = b.injected(FACTORED)
        dense, sparse = (
            settled_plan(b, injection, rows_of(case)).factored for case in (EVERYTHING, SPARSE)
        )
        assert dense is not None
        assert isinstance(dense.tokens, slice)
        assert sparse is not None
        assert isinstance(sparse.tokens, Tensor)

    @pytest.mark.parametrize("form", FORMS)
    def test_random_batches(self, form: str) -> None:
        """One planner through batches of any composition, as an engine uses it."""
        b = bench("llama")
        model, injection = b.injected(FORMS[form])
        draw = random.Random(0)
        for step in range(12):
            names = draw.choices(list(b.adapters), k=draw.randint(1, 9))
            rows = rows_of(" ".join(f"{a}*{draw.choice([1, 1, 2, 5, 20])}" for a in names), step)
            adapters = [b.adapters[name] for name in names]
            with use_plan(injection.plan(adapters, [len(row.ids) for row in rows])):
                found = packed_logits(model, rows)
            for row, logits in zip(rows, found, strict=True):
                assert distance(logits, alone(b.merged[row.name], row)) < EXACT, row.name

    @pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
    def test_half_precision(self, costs: FormCosts) -> None:
        """A bfloat16 backbone against the float32 one: they agree to a few of its roundings."""
        b = bench("llama")
        model = merged(b.bare, b.inventory, None).bfloat16()
        injection = inject(model, b.inventory, costs)
        rows = rows_of("task-0*3 base*2 task-1*1 private*4")
        with use_plan(settled_plan(b, injection, rows)):
            found = packed_logits(model, rows)
        for row, logits in zip(rows, found, strict=True):
            errors = {name: distance(logits, alone(b.merged[name], row)) for name in b.merged}
            near = {name for name, error in errors.items() if error < HALF_PRECISION}
            assert near == ({"base", "no_skill"} if row.name == "base" else {row.name}), errors


class TestExtremeLogits:
    @pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
    def test_rows_without_any_skill_stay_bare(self, costs: FormCosts) -> None:
        b = bench("llama")
        layout = b.inventory.layout
        routing = Routing.checked(
            torch.full(layout.shape("model"), -1e4), layout, "logits", "model"
        )
        task = RoutedTask("never", routing.weights(layout))
        assert task.weights.count_nonzero() == 0
        model, injection = b.injected(costs)
        row = rows_of("base*4")[0]
        injection.plan([task], [4])
        with use_plan(injection.plan([task], [4])):
            assert torch.equal(alone(model, row), alone(b.bare, row))

    def test_saturated_routings_pick_skills_evenly(self) -> None:
        """1e4 for two skills and -1e4 for the others is half of each of the two."""
        b = bench("llama")
        layout = b.inventory.layout
        logits = torch.full(layout.shape("model"), -1e4)
        logits[:, :2] = 1e4
        weights = Routing.checked(logits, layout, "logits", "model").weights(layout)
        assert torch.equal(weights[..., :2], torch.full_like(weights[..., :2], 0.5))
        assert weights[..., 2:].count_nonzero() == 0


class TestUsePlan:
    def test_nesting_is_refused_and_leaves_the_outer_plan_active(self) -> None:
        outer, inner = Plan(1, None, ()), Plan(1, None, ())
        with use_plan(outer) as used:
            assert used is outer
            with pytest.raises(PlanError, match="do not nest"), use_plan(inner):
                pass
            assert active_plan() is outer
        assert active_plan() is None

    def test_an_exception_ends_the_plan(self) -> None:
        with pytest.raises(KeyError), use_plan(Plan(1, None, ())):
            raise KeyError
        assert active_plan() is None
        with use_plan(Plan(1, None, ())) as plan:
            assert active_plan() is plan

    @pytest.mark.parametrize("planned", [1, 3, 5, 8])
    def test_another_number_of_tokens_is_refused(self, planned: int) -> None:
        b = bench("llama")
        model, injection = b.injected(FACTORED)
        rows = rows_of("task-0*4")
        plan = injection.plan([b.adapters["task-0"]], [planned])
        with pytest.raises(PlanError, match=f"expected {planned}; found 4"), use_plan(plan):
            packed_logits(model, rows)
        assert active_plan() is None
        assert torch.equal(alone(model, rows[0]), alone(b.bare, rows[0]))

    def test_a_batch_of_several_rows_counts_all_their_tokens(self) -> None:
        b = bench("llama")
        model, injection = b.injected(FACTORED)
        ids = torch.stack([row.ids for row in rows_of("task-0*4 task-1*4")])
        plan = injection.plan([b.adapters["task-0"], b.adapters["task-1"]], [4, 4])
        with torch.no_grad(), use_plan(plan):
            found = model(input_ids=ids).logits
        for logits, row, name in zip(found, ids, ["task-0", "task-1"], strict=True):
            assert distance(logits, alone(b.merged[name], Row(name, row))) < EXACT

    def test_a_new_thread_sees_no_plan(self) -> None:
        seen: list[Plan | None] = []
        with use_plan(Plan(1, None, ())):
            thread = threading.Thread(target=lambda: seen.append(active_plan()))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_threads_run_under_their_own_plans_at_once(self) -> None:
        b = bench("llama")
        model, injection = b.injected(COMBINED)
        rows = rows_of("task-0*4 task-1*4 private*4")
        plans = {row.name: settled_plan(b, injection, [row]) for row in rows}
        together = threading.Barrier(len(rows))
        found: dict[str, list[Tensor]] = {row.name: [] for row in rows}

        def run(row: Row) -> None:
            for _ in range(5):
                with use_plan(plans[row.name]):
                    together.wait(30)
                    found[row.name].append(alone(model, row))

        threads = [threading.Thread(target=run, args=(row,)) for row in rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for row in rows:
            expected = alone(b.merged[row.name], row)
            assert [distance(y, expected) < EXACT for y in found[row.name]] == [True] * 5


def test_adapters_with_one_key_are_one_function() -> None:
    b = bench("llama")
    keys = [adapter_key(adapter) for adapter in b.adapters.values()]
    assert len(set(keys)) == len(keys)
    assert adapter_key(None) == ""
    again = random_private(b.inventory, 0)
    assert adapter_key(again) == adapter_key(b.adapters["private"])
    assert adapter_key(random_private(b.inventory, 1)) != adapter_key(again)
