"""What a task was, how it comes back, and who did what."""

from collections.abc import Callable

import pytest

from polyhead.adapters.routing import Routing
from polyhead.server.tasks.errors import (
    InvalidCursor,
    StaleGeneration,
    TaskExists,
    UnknownGeneration,
    UnknownTask,
)
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]
Open = Callable[..., Registry]


def actions(registry: Registry, task: str) -> list[tuple[str, str | None]]:
    """What the log says of a task, oldest first, and who did it."""
    return [(entry.action, entry.actor) for entry in reversed(registry.audit(task=task)[0])]


def test_rolling_back_makes_a_task_what_it_was(registry: Registry, routing: Make) -> None:
    first = registry.create("t", routing(1), template="{input}", metadata={"a": 1}, by="ann")
    second = registry.replace("t", routing(2), defaults={"n": 2}, by="bob")
    third = registry.edit("t", template="{input}!")
    back = registry.roll_back("t", first.generation, by="cat")
    assert registry.get("t") == back
    assert (back.generation, back.template, back.metadata) == (
        first.generation,
        "{input}",
        {"a": 1},
    )
    assert back.provenance == {"how": "uploaded", "by": "ann"}
    assert back.created_at == first.created_at < third.updated_at < back.updated_at
    assert registry.content_bytes("t") == routing(1).to_safetensors()
    assert [task.id for task in registry.list(metadata={"a": 1})[0]] == ["t"]
    found = registry.history("t")
    assert [version.task.generation for version in found] == [
        task.generation for task in (back, third, second, first)
    ]
    assert [version.ended for version in found] == [None, "replaced", "replaced", "replaced"]
    assert registry.roll_back("t", third.generation).defaults == {"n": 2}
    assert actions(registry, "t") == [
        ("created", "ann"),
        ("replaced", "bob"),
        ("edited", None),
        ("rolled_back", "cat"),
        ("rolled_back", None),
    ]


def test_rolling_back_refuses_what_is_stale_or_unknown(registry: Registry, routing: Make) -> None:
    first = registry.create("t", routing(1)).generation
    second = registry.replace("t", routing(2)).generation
    with pytest.raises(StaleGeneration):
        registry.roll_back("t", first, if_match=first)
    with pytest.raises(UnknownGeneration, match="'t' has no generation 0000"):
        registry.roll_back("t", "0000")
    with pytest.raises(UnknownTask):
        registry.roll_back("u", first)
    with pytest.raises(UnknownTask):
        registry.history("u")
    assert registry.get("t").generation == second
    assert registry.roll_back("t", second, if_match=second).generation == second
    assert len(registry.history("t")) == 2
    assert registry.roll_back("t", first, if_match=second).generation == first


def test_only_the_newest_versions_are_kept(open_registry: Open, routing: Make) -> None:
    registry = open_registry(kept_versions=2)
    made = [registry.create("t", routing(0)).generation]
    made += [registry.replace("t", routing(seed)).generation for seed in range(1, 5)]
    registry.edit("t", metadata={"a": 1})  # no version: its output is the same
    assert [version.task.generation for version in registry.history("t")] == made[:1:-1]
    with pytest.raises(UnknownGeneration):
        registry.roll_back("t", made[1])
    with registry.database.read() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM contents").scalar_one()
    assert count == 3


def test_a_deleted_task_can_be_restored(registry: Registry, routing: Make) -> None:
    before = registry.create("t", routing(1), metadata={"a": 1})
    edited = registry.replace("t", routing(2), metadata={"a": 2})
    registry.delete("t", by="ann")
    with pytest.raises(UnknownTask):
        registry.get("t")
    assert registry.list() == ([], None)
    assert registry.count() == 0
    assert registry.restore("t", by="bob") == edited == registry.get("t")
    assert registry.content_bytes("t") == routing(2).to_safetensors()
    assert [task.id for task in registry.list(metadata={"a": 2})[0]] == ["t"]
    assert registry.roll_back("t", before.generation).metadata == {"a": 1}
    assert ("deleted", "ann") in actions(registry, "t")
    assert ("restored", "bob") in actions(registry, "t")
    with pytest.raises(TaskExists):
        registry.restore("t")
    with pytest.raises(UnknownTask):
        registry.restore("never")


def test_an_id_in_use_again_is_not_overwritten_by_its_former_task(
    registry: Registry, routing: Make
) -> None:
    registry.create("t", routing(1))
    registry.delete("t")
    second = registry.create("t", routing(2))
    with pytest.raises(TaskExists):
        registry.restore("t")
    assert registry.get("t") == second


def test_what_was_deleted_long_ago_is_forgotten(open_registry: Open, routing: Make) -> None:
    registry = open_registry(restore_seconds=3600.0)
    registry.create("t", routing(1))
    registry.replace("t", routing(2))
    registry.delete("t")
    registry.create("t", routing(3))
    registry.create("u", routing(4))
    registry.delete("u")
    assert registry.purge() == []
    late = open_registry(restore_seconds=1e-6)
    assert sorted(late.purge()) == ["t", "u"]
    assert len(late.history("t")) == 1
    with pytest.raises(UnknownTask):
        registry.restore("u")
    with registry.database.read() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM contents").scalar_one()
    assert count == 1


def test_without_a_time_to_restore_a_deleted_task_is_gone(
    open_registry: Open, routing: Make
) -> None:
    registry = open_registry(restore_seconds=0)
    registry.create("t", routing(1))
    registry.replace("t", routing(2))
    registry.delete("t")
    with pytest.raises(UnknownTask):
        registry.restore("t")


def test_similar_tasks_are_there_now(open_registry: Open, routing: Make) -> None:
    registry = open_registry()
    registry.create("t", routing(1))
    registry.create("u", routing(1))
    registry.create("v", routing(2))
    registry.delete("u")
    registry.replace("v", routing(3))
    assert [task_id for task_id, _ in registry.similar("t")] == ["v"]


def test_the_log_has_pages_and_filters(registry: Registry, routing: Make) -> None:
    registry.create("a.1", routing(1), by="k")
    registry.copy("a.1", "b.1")
    registry.edit("a.1", metadata={"x": 1})
    registry.delete("b.1")
    first, cursor = registry.audit(limit=3)
    second, end = registry.audit(3, cursor)
    assert [(entry.task, entry.action) for entry in (*first, *second)] == [
        ("b.1", "deleted"),
        ("a.1", "edited"),
        ("b.1", "copied"),
        ("a.1", "created"),
    ]
    assert end is None
    assert [entry.action for entry in registry.audit(prefix="b.")[0]] == ["deleted", "copied"]
    created = second[0]
    assert (created.before, created.after, created.actor) == (
        None,
        registry.get("a.1").generation,
        "k",
    )
    with pytest.raises(InvalidCursor):
        registry.audit(cursor="eno")


def test_a_change_that_failed_leaves_no_trace(registry: Registry, routing: Make) -> None:
    task = registry.create("t", routing(1))
    with pytest.raises(TaskExists):
        registry.create("t", routing(2))
    with pytest.raises(StaleGeneration):
        registry.delete("t", if_match="0")
    assert actions(registry, "t") == [("created", None)]
    assert [version.task for version in registry.history("t")] == [task]
