"""What is resident, and that it is never older than what the registry has answered."""

from collections.abc import Callable

import pytest
import torch
from factories import plain_prepare

from polyhead.adapters.plan import PreparedAdapter, RoutedTask
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.catalogue import BASE, Catalogue
from polyhead.server.tasks.contents import Content
from polyhead.server.tasks.errors import UnknownTask
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots
from polyhead.server.tasks.task import Task

Make = Callable[..., Routing]
Open = Callable[..., Registry]


class ObservedRegistry(Registry):
    """Counts what is read from the database; `after_load` runs before the reader has its answer."""

    loads = 0
    after_load: Callable[[], object] | None = None

    def load(self, task_id: str) -> tuple[Task, Content]:
        loaded = super().load(task_id)
        self.loads += 1
        if self.after_load is not None:
            action, self.after_load = self.after_load, None
            action()
        return loaded


def test_a_routing_resolves_to_its_weights(
    registry: Registry, layout: Layout, routing: Make
) -> None:
    task = registry.create("t", routing(1, "logits", "block"))
    resolved = Catalogue(registry, layout, Slots(plain_prepare)).resolve("t")
    assert resolved.task == task
    assert isinstance(resolved.adapter, RoutedTask)
    assert resolved.adapter.key == task.generation
    assert torch.equal(resolved.adapter.weights, routing(1, "logits", "block").weights(layout))
    assert not torch.equal(resolved.adapter.weights, routing(2, "logits", "block").weights(layout))


def test_a_private_adapter_resolves_to_its_factors(
    registry: Registry, layout: Layout, private: PrivateAdapter
) -> None:
    registry.create("t", private)
    adapter = Catalogue(registry, layout, Slots(plain_prepare)).resolve("t").adapter
    assert isinstance(adapter, PreparedAdapter)
    assert adapter.key == private.fingerprint
    assert adapter.nbytes == private.nbytes


def test_the_bare_backbone_resolves_to_no_adapter(registry: Registry, layout: Layout) -> None:
    resolved = Catalogue(registry, layout, Slots(plain_prepare)).resolve("base")
    assert resolved is BASE
    assert resolved.adapter is None
    assert (resolved.task.id, resolved.task.generation) == ("base", "base")


def test_an_unknown_task_never_falls_back(
    registry: Registry, layout: Layout, routing: Make
) -> None:
    catalogue = Catalogue(registry, layout, Slots(plain_prepare))
    for _ in range(2):
        with pytest.raises(UnknownTask):
            catalogue.resolve("t")
    registry.create("t", routing(1))
    assert catalogue.resolve("t").adapter is not None


def test_a_warm_task_touches_no_database(
    open_registry: Open, layout: Layout, routing: Make
) -> None:
    registry = open_registry(ObservedRegistry)
    registry.create("t", routing(1))
    registry.create("u", routing(2))
    catalogue = Catalogue(registry, layout, Slots(plain_prepare))
    first = catalogue.resolve("t")
    assert all(catalogue.resolve("t") is first for _ in range(10))
    assert registry.loads == 1
    catalogue.resolve("u")
    assert registry.loads == 2


def test_the_least_recently_used_goes_first_and_the_bound_holds(
    open_registry: Open, layout: Layout, routing: Make
) -> None:
    registry = open_registry(ObservedRegistry)
    for number in range(6):
        registry.create(f"t{number}", routing(number))
    one = Catalogue(registry, layout, Slots(plain_prepare)).resolve("t0").nbytes
    catalogue = Catalogue(registry, layout, Slots(plain_prepare), max_bytes=3 * one)
    for name in ("t0", "t1", "t2", "t0", "t3"):  # t1 is the one not used for longest
        catalogue.resolve(name)
        assert catalogue.nbytes <= 3 * one
    assert len(catalogue) == 3
    before = registry.loads
    for name in ("t0", "t2", "t3"):
        catalogue.resolve(name)
    assert registry.loads == before
    catalogue.resolve("t1")
    assert registry.loads == before + 1


def test_what_exceeds_the_bound_alone_is_served_but_not_kept(
    registry: Registry, layout: Layout, routing: Make
) -> None:
    registry.create("t", routing(1))
    one = Catalogue(registry, layout, Slots(plain_prepare)).resolve("t").nbytes
    small = Catalogue(registry, layout, Slots(plain_prepare), max_bytes=one - 1)
    assert small.resolve("t").adapter is not None
    assert (len(small), small.nbytes) == (0, 0)
    enough = Catalogue(registry, layout, Slots(plain_prepare), max_bytes=one)
    enough.resolve("t")
    assert (len(enough), enough.nbytes) == (1, one)


def test_the_size_counts_numbers_and_texts(
    registry: Registry, layout: Layout, routing: Make, private: PrivateAdapter
) -> None:
    registry.create("plain", routing(1))
    registry.create("wordy", routing(1), template="x" * 1000, metadata={"note": "y" * 1000})
    registry.create("private", private)
    catalogue = Catalogue(registry, layout, Slots(plain_prepare))
    plain = catalogue.resolve("plain").nbytes
    assert plain >= layout.heads * layout.skills * len(layout.modules) * 4
    assert catalogue.resolve("wordy").nbytes >= plain + 2000
    assert catalogue.resolve("private").nbytes >= private.nbytes


def test_changes_are_seen_as_soon_as_they_return(
    registry: Registry, layout: Layout, routing: Make
) -> None:
    catalogue = Catalogue(registry, layout, Slots(plain_prepare))
    registry.create("t", routing(1))
    held = catalogue.resolve("t")
    replaced = registry.replace("t", routing(2))
    assert catalogue.resolve("t").task == replaced != held.task
    edited = registry.edit("t", template="{input}")
    assert catalogue.resolve("t").task == edited
    annotated = registry.edit("t", metadata={"a": 1})
    assert catalogue.resolve("t").task == annotated
    registry.delete("t")
    with pytest.raises(UnknownTask):
        catalogue.resolve("t")
    assert (len(catalogue), catalogue.nbytes) == (0, 0)
    assert isinstance(held.adapter, RoutedTask)
    assert torch.equal(held.adapter.weights, routing(1).weights(layout))


def test_what_was_read_before_a_change_is_not_kept_after_it(
    open_registry: Open, layout: Layout, routing: Make
) -> None:
    registry = open_registry(ObservedRegistry)
    old = registry.create("t", routing(1))
    catalogue = Catalogue(registry, layout, Slots(plain_prepare))
    registry.after_load = lambda: registry.replace("t", routing(2))
    assert catalogue.resolve("t").task == old  # the change was answered while this was on its way
    assert catalogue.resolve("t").task == registry.get("t") != old
    registry.edit("t", metadata={"a": 1})
    registry.after_load = lambda: registry.delete("t")
    catalogue.resolve("t")
    with pytest.raises(UnknownTask):
        catalogue.resolve("t")
