"""A registry as a file: whole, equal for equal registries, and refused where it was changed."""

import io
import tarfile
from collections.abc import Callable

import pytest
import torch

from polyhead.adapters.inventory import BackboneRef, Inventory, ModuleShape
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.archive import Imported, export_tasks, import_tasks
from polyhead.server.tasks.errors import ArchiveError, UnknownTask
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]


@pytest.fixture
def inventory(layout: Layout) -> Inventory:
    modules = [ModuleShape(name=name, in_features=8, out_features=8) for name in layout.modules]
    backbone = BackboneRef(name="b", fingerprint="f")
    return Inventory.random(backbone, modules, heads=layout.heads, skills=layout.skills, rank=1)


@pytest.fixture
def full(registry: Registry, routing: Make) -> Registry:
    """A registry with every kind of task."""
    registry.create("a", routing(1), template="{input} 🎻", metadata={"x": None}, by="ann")
    registry.create("b", routing(2, "weights", "block"), defaults={"stop": ["\n"]})
    registry.copy("a", "c", metadata={"x": 1.5})
    registry.create("half", routing(3), precision="float16")
    a, b = torch.randn(8, 2), torch.randn(2, 8)
    registry.create("private", PrivateAdapter({"m.0.q": a}, {"m.0.q": b}))
    registry.create("gone", routing(4))
    registry.delete("gone")
    return registry


def exported(registry: Registry) -> bytes:
    file = io.BytesIO()
    assert export_tasks(registry, file) == registry.count()
    return file.getvalue()


def imported(registry: Registry, inventory: Inventory, data: bytes) -> Imported:
    return import_tasks(registry, inventory, io.BytesIO(data))


@pytest.fixture
def elsewhere(full: Registry, layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """An empty registry in another folder."""
    return Registry(tmp_path_factory.mktemp("elsewhere"), full.inventory, layout)


def test_everything_arrives_and_a_second_time_changes_nothing(
    full: Registry, elsewhere: Registry, inventory: Inventory
) -> None:
    data = exported(full)
    assert imported(elsewhere, inventory, data) == Imported(created=5)
    assert elsewhere.list() == full.list()
    for task in full.list()[0]:
        assert elsewhere.content_bytes(task.id) == full.content_bytes(task.id)
    assert elsewhere.similar("a") == full.similar("a")
    with pytest.raises(UnknownTask):
        elsewhere.get("gone")
    assert exported(elsewhere) == data
    before = elsewhere.audit()
    assert imported(elsewhere, inventory, data) == Imported(unchanged=5)
    assert elsewhere.audit() == before
    elsewhere.close()


def test_what_was_changed_comes_back_and_what_is_new_stays(
    full: Registry, inventory: Inventory, routing: Make
) -> None:
    data = exported(full)
    changed = full.replace("a", routing(9)).generation
    full.edit("b", metadata={"y": 1})
    full.delete("c")
    full.create("new", routing(8))
    assert imported(full, inventory, data) == Imported(created=1, replaced=2, unchanged=2)
    assert full.get("a").template == "{input} 🎻"
    assert full.get("b").metadata == {}
    assert full.get("new").id == "new"
    assert full.roll_back("a", changed).generation == changed
    assert full.audit(task="c")[0][0].action == "imported"


def rewritten(data: bytes, change: Callable[[str, bytes], tuple[str, bytes]]) -> bytes:
    """The archive with members changed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            source = old.extractfile(member)
            assert source is not None
            name, content = change(member.name, source.read())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d: (n, d.replace(b'"format": 1', b'"format": 2')), "expected {'format': 1"),
        (lambda n, d: (n.replace("tasks/", "../"), d), "expected contents/… or tasks/…"),
        (lambda n, d: (n, d.replace(b'"a"', b'"a b"')), "found 'a b'"),
        (lambda n, d: (n, d.replace(b"{input}", b"{input}!")), "its generation is not that"),
        (lambda n, d: (n, d.replace(b'"kind"', b'"kinds"')), "tasks/a.json: Field required"),
        (lambda n, d: (n, d[:-4] + b"\0\0\0?" if n.startswith("con") else d), "have changed"),
        (lambda n, d: (n, d[:99] if n.startswith("con") else d), "safetensors"),
    ],
)
def test_an_archive_that_was_changed_is_refused(
    full: Registry,
    elsewhere: Registry,
    inventory: Inventory,
    change: Callable[[str, bytes], tuple[str, bytes]],
    message: str,
) -> None:
    data = rewritten(exported(full), change)
    with pytest.raises(Exception, match=message) as caught:
        imported(elsewhere, inventory, data)
    assert type(caught.value).__module__ == ArchiveError.__module__
    assert elsewhere.count() == 0
    elsewhere.close()


def test_what_is_no_archive_is_refused(registry: Registry, inventory: Inventory) -> None:
    with pytest.raises(ArchiveError, match="not a whole tar file"):
        imported(registry, inventory, b"no tar" * 1000)


def test_half_an_archive_is_refused(full: Registry, inventory: Inventory) -> None:
    data = exported(full)
    with pytest.raises(ArchiveError, match="not a whole tar file"):
        imported(full, inventory, data[: len(data) // 2])
