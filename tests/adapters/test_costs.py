from itertools import chain, combinations
from math import isfinite

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.adapters.costs import FormCosts, RentOrBuy
from polyhead.adapters.measuring import measure_costs
from polyhead.adapters.ops import SkillGroup

TABLE = FormCosts(factored_step=8, factored_token=1, combined_task=4, combined_token=0, fold=15)
# Whole numbers, so that sums are exact and ties are ties.
WHOLE = st.integers(0, 20).map(float)
TABLES = st.builds(FormCosts, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
STEPS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 12), max_size=5)


@pytest.mark.parametrize(
    ("tokens", "available", "combined"),
    [
        ({}, "", ""),
        ({"a": 5}, "", ""),  # its factors do not exist
        ({"a": 5, "b": 1}, "b", ""),  # b alone would only add to the step that a needs anyway
        ({"a": 5, "b": 5}, "b", "b"),
        ({"a": 4, "b": 5, "c": 1}, "ab", "b"),  # a tie stays factored
        ({"a": 1}, "a", "a"),  # 4 is less than 8 + 1: nothing is left to factor
        ({"a": 1, "b": 1}, "ab", "ab"),  # 8 against 8 + 2
        ({"a": 1, "b": 1, "c": 1}, "abc", ""),  # 12 against 8 + 3
        ({"a": 1, "b": 1, "c": 1}, "ab", ""),
        ({"a": 1, "b": 1, "c": 9}, "abc", "abc"),  # 12 against 8 + 2 + 4
        ({"a": 1, "b": 1, "c": 9}, "ac", "c"),  # b has to be factored, so a may as well be
        ({"a": 1}, "abc", "a"),  # factors of tasks that are not in the step do not matter
    ],
)
def test_choices_on_a_hand_made_table(
    tokens: dict[str, int], available: str, combined: str
) -> None:
    assert TABLE.choose_combined(tokens, set(available)) == set(combined)


def total(costs: FormCosts, tokens: dict[str, int], combined: set[str]) -> float:
    """What a step costs that combines these tasks and factors the others."""
    factored = tokens.keys() - combined
    own = sum(costs.combined_task + tokens[key] * costs.combined_token for key in combined)
    each = sum(tokens[key] * costs.factored_token for key in factored)
    return own + each + (costs.factored_step if factored else 0.0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(costs=TABLES, tokens=STEPS, available=st.sets(st.sampled_from("abcdef")))
def test_no_other_choice_is_cheaper(
    costs: FormCosts, tokens: dict[str, int], available: set[str]
) -> None:
    possible = sorted(tokens.keys() & available)
    subsets = chain.from_iterable(combinations(possible, n) for n in range(len(possible) + 1))
    chosen = costs.choose_combined(tokens, available)
    assert chosen <= set(possible)
    assert total(costs, tokens, chosen) == min(total(costs, tokens, set(s)) for s in subsets)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(costs=TABLES, tokens=STEPS, available=st.sets(st.sampled_from("abcdef")))
def test_more_factors_never_send_a_task_back(
    costs: FormCosts, tokens: dict[str, int], available: set[str]
) -> None:
    for more in "abcdef":
        before = costs.choose_combined(tokens, available)
        assert before <= costs.choose_combined(tokens, available | {more})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(costs=TABLES, tokens=STEPS, extra=st.integers(1, 9))
def test_more_tokens_never_send_a_task_back(
    costs: FormCosts, tokens: dict[str, int], extra: int
) -> None:
    """Where a token costs less combined than factored, as on any device so far."""
    if costs.combined_token > costs.factored_token:
        costs = FormCosts(costs.factored_step, costs.combined_token, costs.combined_task, 0.0)
    for key in tokens:
        before = costs.choose_combined(tokens, tokens.keys())
        more = tokens | {key: tokens[key] + extra}
        assert before <= costs.choose_combined(more, tokens.keys())


class TestRentOrBuy:
    def due(self, renting: RentOrBuy, tokens: dict[str, int], resident: str = "") -> set[str]:
        return renting.due(TABLE, tokens, set(resident))

    def test_factors_are_built_once_they_would_have_paid(self) -> None:
        """5 tokens combined save 8 + 1 a step, so 15 are missed in the second one."""
        renting = RentOrBuy()
        assert [self.due(renting, {"a": 5}) for _ in range(2)] == [set(), {"a"}]

    def test_a_single_large_step_pays_at_once(self) -> None:
        assert self.due(RentOrBuy(), {"a": 19 + 8}) == {"a"}

    def test_what_is_resident_or_not_worth_it_is_never_built(self) -> None:
        renting = RentOrBuy()
        many = dict.fromkeys("abc", 1)  # 12 against 8 + 3, see above
        for _ in range(50):
            assert self.due(renting, many) == set()
            assert self.due(renting, {"d": 50}, resident="d") == set()

    def test_one_step_builds_for_one_task_at_most_of_those_that_do_not_pay_in_it(self) -> None:
        renting, built = RentOrBuy(), set[str]()
        for step in range(8):
            due = renting.due(TABLE, dict.fromkeys("abcd", 16), built)
            assert len(due) <= 1, step
            assert not due & built
            built |= due
        assert built == set("abcd")

    def test_all_that_pay_in_a_step_are_built_in_it(self) -> None:
        """100 tokens combined save 96, 16 tokens 12, which comes to 15 in the second step."""
        renting, tokens = RentOrBuy(), {"a": 100, "b": 16, "c": 100}
        assert self.due(renting, tokens) == {"a", "c"}
        assert self.due(renting, tokens, resident="ac") == {"b"}

    def test_tasks_that_pay_only_together_are_built_one_after_the_other(self) -> None:
        """Once b is resident only a stands between the step and its fixed cost, so that all of
        it is a's to save: 1 a step, none with half of it."""
        costs = FormCosts(8, 1, 9, 0, 15)
        tokens, renting, built = {"a": 2, "b": 14}, RentOrBuy(), set[str]()
        for _ in range(40):
            built |= renting.due(costs, tokens, built)
        assert built == {"a", "b"}

    @pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
    def test_of_equal_tasks_the_first_of_the_step_is_built(self, order: str) -> None:
        renting, tokens = RentOrBuy(), dict.fromkeys(order, 16)
        assert [renting.due(TABLE, tokens, set()) for _ in range(2)] == [set(), {order[0]}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_costs_are_usable(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 4, 16, 2, generator=generator)
    b = torch.randn(4, 4, 2, 16, generator=generator)
    costs = measure_costs([SkillGroup.pack([a, a], [b, b], 1.0, dtype)] * 3)
    assert all(isfinite(value) for value in vars(costs).values())
    assert costs.factored_token >= 0
    assert costs.combined_token >= 0
    assert costs.factored_step + costs.factored_token > 0
    assert costs.combined_task + costs.combined_token > 0
    assert costs.fold > 0
