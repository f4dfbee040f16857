from collections import Counter
from itertools import islice
from typing import Any

import pytest

from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.mixture import Mixture, shares


def example(task: int, number: int, length: int = 4) -> Encoded:
    return Encoded((task, number), (1,) * (length - 2))


def mixture(sizes: tuple[int, ...] = (3, 30, 12), **options: Any) -> Mixture:
    tasks = [[example(task, i) for i in range(size)] for task, size in enumerate(sizes)]
    given = {"tasks_per_step": 2, "examples_per_task": 3, "sampling": "balanced", "seed": 0}
    return Mixture(tasks, **{**given, **options})


def test_a_step_is_a_function_of_seed_and_number() -> None:
    whole = list(islice(mixture().steps(), 9))
    assert list(islice(mixture().steps(5), 4)) == whole[5:]
    assert list(islice(mixture(seed=1).steps(), 9)) != whole


def test_a_step_has_equally_many_examples_of_each_task() -> None:
    for drawn in islice(mixture().steps(), 20):
        assert len(drawn) == 6
        assert all(one.prompt[0] == task for task, one in drawn)
        assert all(count % 3 == 0 for count in Counter(task for task, _ in drawn).values())


@pytest.mark.parametrize(
    ("sampling", "wanted"), [("balanced", (1 / 3, 1 / 3)), ("proportional", (3 / 45, 30 / 45))]
)
def test_tasks_come_in_the_shares_that_are_asked_for(
    sampling: str, wanted: tuple[float, float]
) -> None:
    drawn = [pair for step in islice(mixture(sampling=sampling).steps(), 600) for pair in step]
    counts = Counter(task for task, _ in drawn)
    assert counts[0] / len(drawn) == pytest.approx(wanted[0], abs=0.03)
    assert counts[1] / len(drawn) == pytest.approx(wanted[1], abs=0.03)


def test_every_example_comes_before_any_comes_again() -> None:
    seen = [one for s in islice(mixture().steps(), 40) for task, one in s if task == 2]
    assert len(set(seen[:12])) == 12
    assert set(seen[:12]) == set(seen[12:24])
    assert seen[:12] != seen[12:24], "each round has an order of its own"


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_shares_are_whole_and_of_about_equal_work(parts: int) -> None:
    drawn = [(i % 3, example(i % 3, i, 3 + i % 5)) for i in range(12)]
    found = shares(drawn, parts)
    assert len(found) == parts
    assert Counter(pair for part in found for pair in part) == Counter(drawn)
    work = [sum(len(one) for _, one in part) for part in found]
    assert max(work) - min(work) <= 8
    assert min(map(len, found)) >= 1


def test_as_many_parts_as_examples_have_one_each() -> None:
    drawn = [(0, example(0, i, 90 if i == 0 else 3)) for i in range(4)]
    assert [len(part) for part in shares(drawn, 4)] == [1, 1, 1, 1]
