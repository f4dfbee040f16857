"""The busiest tasks have figures of their own, all others one, and nothing is counted twice."""

import random

import pytest

from polyhead.server.metrics.top_tasks import HALVE_AFTER, OTHER, TaskFigures, TopTasks

ONE = TaskFigures(requests=1, prompt_tokens=2, generation_tokens=3, seconds=0.5)


def named(top: TopTasks) -> set[str]:
    return set(top.figures()) - {OTHER}


def test_as_many_as_may_have_figures_of_their_own() -> None:
    top = TopTasks(2)
    for task in ("a", "b", "c", "a"):
        top.add(task, ONE)
    assert named(top) == {"a", "b"}
    assert top.figures()["a"] == TaskFigures(2, 4, 6, 1.0)
    assert top.figures()[OTHER] == ONE


def test_none_may_have_any() -> None:
    top = TopTasks(0)
    top.add("a", ONE)
    assert top.figures() == {OTHER: ONE}


@pytest.mark.parametrize("seed", range(3))
def test_the_busiest_of_a_power_law_are_found_among_thousands(seed: int) -> None:
    draw = random.Random(seed)
    top = TopTasks(8)
    tasks = [f"t{number}" for number in range(2000)]
    weights = [1 / (1 + number) for number in range(2000)]
    for task in draw.choices(tasks, weights, k=20_000):
        top.add(task, ONE)
    assert {"t0", "t1", "t2", "t3"} <= named(top)
    assert len(named(top)) == 8


def test_who_was_busy_once_makes_place_for_who_is_now() -> None:
    top = TopTasks(1)
    for _ in range(500):
        top.add("early", ONE)
    for _ in range(20 * HALVE_AFTER):
        top.add("late", ONE)
    assert named(top) == {"late"}


def test_a_task_that_comes_and_goes_does_not_make_series_flap() -> None:
    top = TopTasks(1)
    changes, last = 0, set[str]()
    for number in range(2000):
        top.add("ab"[number % 2], ONE)
        changes += named(top) != last
        last = named(top)
    assert changes == 1
