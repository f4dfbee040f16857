"""Which inventory a registry belongs to, and the tasks that come with it."""

from collections.abc import Callable

import pytest

from polyhead.adapters.inventory import BackboneRef, Inventory, ModuleShape
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.errors import InvalidId, InventoryMismatch, UnknownTask
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]
Open = Callable[..., Registry]


def inventory_with(layout: Layout, tasks: dict[str, Routing], seed: int = 0) -> Inventory:
    modules = [ModuleShape(name=name, in_features=8, out_features=8) for name in layout.modules]
    backbone = BackboneRef(name="b", fingerprint="f")
    made = Inventory.random(
        backbone, modules, heads=layout.heads, skills=layout.skills, rank=1, seed=seed
    )
    made.tasks.update(tasks)
    return made


def test_the_inventorys_tasks_are_registered_once(
    open_registry: Open, layout: Layout, routing: Make
) -> None:
    inventory = inventory_with(layout, {"a": routing(1), "b": routing(2)})
    inventory.templates["a"] = "{input} is"
    registry = open_registry(inventory=inventory.fingerprint)
    registry.create("b", routing(3))
    assert registry.seed(inventory) == ["a"]
    assert registry.get("a").template == "{input} is"
    assert registry.get("a").provenance == {"how": "seeded", "from": inventory.fingerprint}
    assert registry.content_bytes("a") == routing(1).to_safetensors()
    assert registry.content_bytes("b") == routing(3).to_safetensors()
    registry.delete("a")
    registry.close()
    again = open_registry(inventory=inventory.fingerprint)
    inventory.tasks["c"] = routing(4)
    assert again.seed(inventory) == ["c"]
    assert again.get("c").template is None
    with pytest.raises(UnknownTask):
        again.get("a")


def test_seeding_is_all_or_none(registry: Registry, layout: Layout, routing: Make) -> None:
    with pytest.raises(InvalidId, match="found 'a b'"):
        registry.seed(inventory_with(layout, {"a": routing(1), "a b": routing(2)}))
    assert registry.count() == 0


def test_another_inventory_is_refused_by_name(
    open_registry: Open, layout: Layout, routing: Make
) -> None:
    old, new = "a" * 64, "b" * 64
    registry = open_registry(inventory=old)
    registry.create("t", routing(1))
    registry.close()
    other = Layout(layout.modules[:2], heads=2, skills=4)
    with pytest.raises(InventoryMismatch, match=f"1 tasks .* {old}.* {new}") as caught:
        open_registry(inventory=new, layout=other)
    assert (caught.value.found, caught.value.expected) == (old, new)
    kept = open_registry(inventory=old)
    assert kept.content_bytes("t") == routing(1).to_safetensors()


@pytest.mark.parametrize("touch", ["edit", "copy", "replace"])
def test_only_what_came_with_the_old_inventory_gives_way_to_a_new_one(
    open_registry: Open, layout: Layout, routing: Make, touch: str
) -> None:
    old = inventory_with(layout, {"a": routing(1), "b": routing(2)}, seed=1)
    new = inventory_with(layout, {"a": routing(3)}, seed=2)
    registry = open_registry(inventory=old.fingerprint)
    registry.seed(old)
    registry.close()
    registry = open_registry(inventory=new.fingerprint)
    assert registry.count() == 0
    assert registry.seed(new) == ["a"]
    if touch == "edit":
        registry.edit("a", template="{input}")
    elif touch == "copy":
        registry.copy("a", "mine")
    else:
        registry.replace("a", routing(4))
    registry.close()
    with pytest.raises(InventoryMismatch):
        open_registry(inventory=old.fingerprint)
