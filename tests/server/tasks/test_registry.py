"""What one caller of the registry sees."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import torch

from polyhead.adapters.errors import PrivateAdapterError, RoutingError
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.errors import (
    InvalidId,
    NotARouting,
    ReservedId,
    StaleGeneration,
    TaskExists,
    UnknownTask,
)
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]


def test_everything_comes_back_from_another_process_start(
    open_registry: Callable[..., Registry], routing: Make
) -> None:
    first = open_registry()
    before = datetime.now(UTC)
    created = first.create(
        "sum-en",
        routing(1),
        template="Sum up: {input}",
        defaults={"max_tokens": 64, "stop": ["\n"]},
        metadata={"language": "en", "shots": 5, "draft": True, "note": None},
    )
    first.close()
    found = open_registry().get("sum-en")
    assert found == created
    assert found.template == "Sum up: {input}"
    assert found.defaults == {"max_tokens": 64, "stop": ["\n"]}
    assert found.metadata == {"language": "en", "shots": 5, "draft": True, "note": None}
    assert (found.kind, found.granularity, found.routing_kind) == ("routing", "module", "logits")
    assert found.provenance == {"how": "uploaded"}
    assert before <= found.created_at == found.updated_at <= datetime.now(UTC)


@pytest.mark.parametrize("kind", ["logits", "weights"])
@pytest.mark.parametrize("granularity", ["module", "block", "model"])
def test_a_routing_is_kept_exactly_as_given(
    registry: Registry, routing: Make, layout: Layout, kind: str, granularity: str
) -> None:
    given = routing(1, kind, granularity)
    task = registry.create("t", given)
    assert (task.routing_kind, task.granularity) == (kind, granularity)
    found = registry.content("t", task.generation)
    assert isinstance(found, Routing)
    assert torch.equal(found.values, given.values)
    assert (found.kind, found.granularity) == (kind, granularity)
    again = Routing.from_safetensors(registry.content_bytes("t"), layout)
    assert again.fingerprint == given.fingerprint != routing(2, kind, granularity).fingerprint


def test_a_private_adapter_is_kept_exactly_as_given(
    registry: Registry, private: PrivateAdapter
) -> None:
    task = registry.create("t", private)
    assert (task.kind, task.granularity, task.routing_kind) == ("private", None, None)
    found = registry.content("t", task.generation)
    assert isinstance(found, PrivateAdapter)
    assert found.fingerprint == private.fingerprint
    assert all(torch.equal(found.a[name], private.a[name]) for name in private.a)
    assert all(torch.equal(found.b[name], private.b[name]) for name in private.b)
    with pytest.raises(NotARouting, match="'t' is a private adapter"):
        registry.similar("t")


@pytest.mark.parametrize("task_id", ["a", "A.b_c-9", "0" * 128])
def test_ids_that_are_accepted(registry: Registry, routing: Make, task_id: str) -> None:
    registry.create(task_id, routing(1))
    assert registry.get(task_id).id == task_id


@pytest.mark.parametrize("task_id", ["", "-a", ".a", "a/b", "a b", "é", "a\n", "0" * 129])
def test_ids_that_are_refused(registry: Registry, routing: Make, task_id: str) -> None:
    with pytest.raises(InvalidId, match="task id: expected"):
        registry.create(task_id, routing(1))
    registry.create("t", routing(1))
    with pytest.raises(InvalidId):
        registry.copy("t", task_id)
    assert registry.count() == 1


def test_the_bare_backbones_id_is_reserved(registry: Registry, routing: Make) -> None:
    with pytest.raises(ReservedId):
        registry.create("base", routing(1))
    registry.create("base2", routing(1))


def test_an_id_is_taken_once(registry: Registry, routing: Make) -> None:
    first = registry.create("t", routing(1))
    with pytest.raises(TaskExists, match="'t' is registered already") as caught:
        registry.create("t", routing(2))
    assert caught.value.task_id == "t"
    with pytest.raises(TaskExists):
        registry.copy("t", "t")
    assert registry.get("t") == first
    assert registry.content_bytes("t") == routing(1).to_safetensors()


def test_unknown_tasks_are_named(registry: Registry, routing: Make) -> None:
    registry.create("t", routing(1))
    calls: list[Callable[[], object]] = [
        lambda: registry.get("x"),
        lambda: registry.load("x"),
        lambda: registry.content("x", "0"),
        lambda: registry.content_bytes("x"),
        lambda: registry.replace("x", routing(1)),
        lambda: registry.edit("x", template=None),
        lambda: registry.delete("x"),
        lambda: registry.copy("x", "y"),
        lambda: registry.similar("x"),
    ]
    for call in calls:
        with pytest.raises(UnknownTask, match="no task 'x' is registered"):
            call()
    assert registry.count() == 1


def test_a_content_that_does_not_fit_is_refused_before_anything_is_stored(
    registry: Registry, private: PrivateAdapter
) -> None:
    wide = Routing(torch.zeros(4, 2, 5))
    with pytest.raises(RoutingError, match=r"found \[4, 2, 5\]"):
        registry.create("t", wide)
    alien = PrivateAdapter({"m.7.q": private.a["m.0.q"]}, {"m.7.q": private.b["m.0.q"]})
    with pytest.raises(PrivateAdapterError, match=r"found \['m\.7\.q'\]"):
        registry.create("t", alien)
    assert registry.count() == 0


def test_the_generation_changes_with_the_output_and_with_nothing_else(
    registry: Registry, routing: Make
) -> None:
    task = registry.create("t", routing(1), template="{input}", defaults={"top_k": 1})
    seen = {task.generation}
    assert registry.edit("t", metadata={"a": 1}).generation in seen
    assert registry.copy("t", "u").generation in seen
    for changed in (
        registry.edit("t", template="{input}!"),
        registry.edit("t", defaults={"top_k": 2}),
        registry.replace("t", routing(2), template="{input}!", defaults={"top_k": 2}),
        registry.replace("t", routing(2, "weights"), template="{input}!", defaults={"top_k": 2}),
        registry.edit("t", template=None),
    ):
        assert changed.generation not in seen
        seen.add(changed.generation)
    registry.replace("t", routing(1), template="{input}", defaults={"top_k": 1})
    assert registry.get("t").generation == task.generation


def test_the_generation_depends_on_the_inventory(
    open_registry: Callable[..., Registry], routing: Make
) -> None:
    registry = open_registry()
    one = registry.create("t", routing(1)).generation
    registry.delete("t")
    registry.close()
    other = open_registry(inventory="2" * 64).create("t", routing(1)).generation
    assert one != other


def test_replace_renews_everything_but_id_and_creation(registry: Registry, routing: Make) -> None:
    old = registry.create("t", routing(1), template="{input}", metadata={"a": 1})
    new = registry.replace("t", routing(2), provenance={"how": "fit"}, if_match=old.generation)
    assert (new.template, new.metadata, new.provenance) == (None, {}, {"how": "fit"})
    assert new.created_at == old.created_at < new.updated_at
    assert registry.get("t") == new
    assert registry.content_bytes("t") == routing(2).to_safetensors()
    assert registry.list(metadata={"a": 1})[0] == []
    with pytest.raises(StaleGeneration) as caught:
        registry.content("t", old.generation)
    assert (caught.value.expected, caught.value.found) == (old.generation, new.generation)


def test_edit_leaves_what_is_not_named(registry: Registry, routing: Make) -> None:
    registry.create("t", routing(1), template="{input}", defaults={"n": 1}, metadata={"a": 1})
    edited = registry.edit("t", template=None)
    assert (edited.template, edited.defaults, edited.metadata) == (None, {"n": 1}, {"a": 1})
    edited = registry.edit("t", metadata={"b": 2})
    assert (edited.template, edited.defaults, edited.metadata) == (None, {"n": 1}, {"b": 2})
    assert registry.get("t") == edited
    assert [task.id for task in registry.list(metadata={"b": 2})[0]] == ["t"]
    assert registry.list(metadata={"a": 1})[0] == []


def test_a_stale_generation_changes_nothing(registry: Registry, routing: Make) -> None:
    old = registry.create("t", routing(1)).generation
    now = registry.replace("t", routing(2), metadata={"kept": True})
    calls: list[Callable[[], object]] = [
        lambda: registry.replace("t", routing(3), if_match=old),
        lambda: registry.edit("t", metadata={}, if_match=old),
        lambda: registry.delete("t", if_match=old),
    ]
    for call in calls:
        with pytest.raises(StaleGeneration, match=f"expected generation {old}"):
            call()
    assert registry.get("t") == now
    registry.delete("t", if_match=now.generation)
    assert registry.count() == 0


def test_a_copy_lives_on_its_own(registry: Registry, routing: Make) -> None:
    source = registry.create("t", routing(1), template="{input}", metadata={"a": 1})
    copy = registry.copy("t", "u", metadata={"a": 2})
    assert (copy.template, copy.metadata) == ("{input}", {"a": 2})
    assert copy.provenance == {"how": "copied", "from": "t", "generation": source.generation}
    assert copy.created_at == copy.updated_at > source.created_at
    registry.replace("t", routing(2))
    registry.delete("t")
    assert registry.get("u") == copy
    assert registry.content_bytes("u") == routing(1).to_safetensors()


def test_a_deleted_id_can_be_used_again(registry: Registry, routing: Make) -> None:
    registry.create("t", routing(1), metadata={"a": 1})
    registry.delete("t")
    with pytest.raises(UnknownTask):
        registry.delete("t")
    registry.create("t", routing(2))
    assert registry.content_bytes("t") == routing(2).to_safetensors()


def test_a_listener_hears_of_a_change_before_its_caller_and_after_a_failure(
    registry: Registry, routing: Make
) -> None:
    seen: list[tuple[str, str]] = []
    registry.create("t", routing(1))
    registry.subscribe(lambda task_id: seen.append((task_id, registry.get("t").generation)))
    replaced = registry.replace("t", routing(2)).generation
    assert seen == [("t", replaced)]
    edited = registry.edit("t", template="{input}").generation
    with pytest.raises(StaleGeneration):
        registry.delete("t", if_match=replaced)
    assert seen[1:] == [("t", edited), ("t", edited)]
