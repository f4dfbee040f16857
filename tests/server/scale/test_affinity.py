"""Tasks keep to their replica, and leave it when it is the busier one."""

import random
from collections import Counter

import pytest

from polyhead.server.scale.affinity import SHARE, SLACK, choose, ranked

REPLICAS = [f"replica-{i}" for i in range(5)]
KEYS = [f"task-{i}" for i in range(2000)]
IDLE = dict.fromkeys(REPLICAS, 0)


def home(key: str, loads: dict[str, int]) -> list[str]:
    return choose(key, loads)[0]


def test_a_task_has_one_home_whatever_order_the_replicas_come_in() -> None:
    for key in KEYS[:50]:
        assert len(home(key, IDLE)) == 1
        assert home(key, dict(reversed(IDLE.items()))) == home(key, IDLE)


def test_tasks_are_spread_evenly() -> None:
    counts = Counter(home(key, IDLE)[0] for key in KEYS)
    assert set(counts) == set(REPLICAS)
    assert max(counts.values()) < 1.25 * min(counts.values())


def test_a_lost_replica_moves_only_its_own_tasks() -> None:
    left = {name: 0 for name in REPLICAS if name != "replica-2"}
    moved = [key for key in KEYS if home(key, IDLE) != home(key, left)]
    assert moved == [key for key in KEYS if home(key, IDLE) == ["replica-2"]]
    assert {home(key, left)[0] for key in moved} == set(left)


def test_a_busy_task_spreads_over_the_next_of_its_order() -> None:
    first, second, third, *_ = ranked("task-1", REPLICAS)
    assert home("task-1", {**IDLE, first: SLACK}) == [first]
    assert home("task-1", {**IDLE, first: 50}) == [second]
    assert home("task-1", {**IDLE, first: 50, second: 50}) == [third]
    assert home("task-1", dict.fromkeys(REPLICAS, 50)) == [first]


def test_one_task_alone_spreads_over_as_many_replicas_as_its_bound_asks_for() -> None:
    loads = dict(IDLE)
    for _ in range(200):
        loads[home("task-1", loads)[0]] += 1
    assert max(loads.values()) <= 200 / len(loads) * 1.25 + SLACK + 1
    # At 1.25 of the mean each, four of five hold everything.
    assert sum(load > 0 for load in loads.values()) == len(loads) / SHARE


def test_whoever_has_no_task_gets_two_drawn_ones() -> None:
    draw = random.Random(0)
    found = [choose("", IDLE, draw)[0] for _ in range(200)]
    assert all(len(set(pair)) == 2 for pair in found)
    assert {name for pair in found for name in pair} == set(REPLICAS)


def test_every_replica_is_tried_in_the_end() -> None:
    for key in ("", "task-1"):
        assert set(choose(key, IDLE)[-1]) == set(REPLICAS)


@pytest.mark.parametrize("key", ["", "task-1"])
def test_one_replica_and_none_are_no_choice(key: str) -> None:
    assert choose(key, {"only": 9}) == [["only"]]
    assert choose(key, {}) == []
