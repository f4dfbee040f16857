"""Pages of tasks: complete, in order, filtered, and steady while others write."""

from collections.abc import Callable

import pytest

from polyhead.adapters.routing import Routing
from polyhead.server.tasks.errors import InvalidCursor
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.task import JsonScalar

Make = Callable[..., Routing]


def walk(registry: Registry, limit: int, between: Callable[[], object] = int) -> list[str]:
    ids: list[str] = []
    cursor: str | None = None
    while True:
        tasks, cursor = registry.list(limit, cursor)
        assert len(tasks) <= limit
        ids += [task.id for task in tasks]
        if cursor is None:
            return ids
        between()


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 21, 100])
def test_pages_are_complete_and_in_order(registry: Registry, routing: Make, limit: int) -> None:
    ids = [f"{letter}{number}" for letter in "aBc_x"[:4] for number in range(5)]
    ids = [task_id.lstrip("_") for task_id in ids]
    registry.create(ids[0], routing(1))
    for task_id in ids[1:]:
        registry.copy(ids[0], task_id)
    assert walk(registry, limit) == sorted(set(ids))
    assert registry.count() == len(set(ids))


def test_pages_are_steady_under_inserts_and_deletions(registry: Registry, routing: Make) -> None:
    steady = [f"s{number:02}" for number in range(12)]
    registry.create("a", routing(1))
    for task_id in steady:
        registry.copy("a", task_id)
    fresh = iter([("a", "a1"), ("a1", "s055"), ("s055", "z"), ("z", "0"), ("0", "s0")])

    def disturb() -> None:
        pair = next(fresh, None)
        if pair is not None:  # a task before, amid or after the page, and its source away
            registry.copy(*pair)
            registry.delete(pair[0])

    ids = walk(registry, 3, disturb)
    assert [task_id for task_id in ids if task_id in steady] == steady
    assert len(ids) == len(set(ids))


def test_an_empty_registry_has_one_empty_page(registry: Registry) -> None:
    assert registry.list() == ([], None)


@pytest.mark.parametrize("cursor", ["", "!", "é", "a", "LWE", "YS9i", "YQ\n/"])
def test_foreign_cursors_are_refused(registry: Registry, cursor: str) -> None:
    with pytest.raises(InvalidCursor, match="expected the 'next' of an earlier page"):
        registry.list(10, cursor)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, ["t0", "t1", "t2", "t3"]),
        ({"language": "en"}, ["t0", "t1"]),
        ({"language": "en", "shots": 5}, ["t1"]),
        ({"shots": "5"}, ["t1", "t3"]),
        ({"draft": True}, ["t2"]),
        ({"draft": "true"}, ["t2"]),
        ({"draft": None}, ["t3"]),
        ({"language": "e"}, []),
        ({"lang": "en"}, []),
        ({"language": "' OR 1=1 --"}, []),
    ],
)
def test_filters_match_whole_values_and_all_of_them(
    registry: Registry, routing: Make, wanted: dict[str, JsonScalar], ids: list[str]
) -> None:
    registry.create("t0", routing(0), metadata={"language": "en"})
    registry.create("t1", routing(1), metadata={"language": "en", "shots": 5})
    registry.create("t2", routing(2), metadata={"language": "de", "draft": True})
    registry.create("t3", routing(3), metadata={"shots": 5, "draft": None})
    assert [task.id for task in registry.list(metadata=wanted)[0]] == ids


@pytest.mark.parametrize(
    ("prefix", "ids"),
    [("a", ["a", "a-b", "a_b", "ab"]), ("a_", ["a_b"]), ("A", ["A"]), ("a%", []), ("", None)],
)
def test_a_prefix_is_taken_literally(
    registry: Registry, routing: Make, prefix: str, ids: list[str] | None
) -> None:
    every = ["A", "a", "a-b", "a_b", "ab", "b"]
    for task_id in every:
        registry.create(task_id, routing(1))
    found, _ = registry.list(prefix=prefix)
    assert [task.id for task in found] == (every if ids is None else ids)


def test_filters_hold_across_pages(registry: Registry, routing: Make) -> None:
    for number in range(9):
        registry.create(f"t{number}", routing(number), metadata={"even": number % 2 == 0})
    first, cursor = registry.list(3, metadata={"even": True})
    second, end = registry.list(3, cursor, metadata={"even": True})
    assert [task.id for task in (*first, *second)] == ["t0", "t2", "t4", "t6", "t8"]
    assert cursor is not None
    assert end is None
