"""The database file: its schema, its durability settings, its size, and what can go wrong."""

import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.dialects import FILE_NAME
from polyhead.server.tasks.errors import RegistryUnavailable, SchemaTooNew
from polyhead.server.tasks.models import metadata
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.sql import Database

Make = Callable[..., Routing]
Open = Callable[..., Registry]


@pytest.fixture
def database_url() -> None:
    """SQLite only: what is tested here is its file."""


def connect(folder: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None))


def rows_of(folder: Path, table: str) -> int:
    with connect(folder) as raw:
        (count,) = raw.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)


def test_the_migrations_build_what_the_models_say(tmp_path: Path) -> None:
    database = Database(tmp_path, lock_timeout=5)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    with database.write() as connection:
        connection.execute(text("ALTER TABLE tasks ADD COLUMN other TEXT"))
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) != []
    database.close()


def test_commits_wait_for_the_disk(tmp_path: Path) -> None:
    database = Database(tmp_path, lock_timeout=5)
    with database.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
    database.close()


def test_a_newer_schema_is_refused(open_registry: Open, tmp_path: Path) -> None:
    open_registry().close()
    with connect(tmp_path / "data") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaTooNew, match="9999"):
        open_registry()


def test_a_file_that_is_no_database_is_refused(open_registry: Open, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(RegistryUnavailable, match="not a database"):
        open_registry()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryUnavailable, match="file/data: Not a directory"):
        Registry(tmp_path / "file" / "data", "1", layout)


def test_another_process_that_writes_is_waited_for_and_then_refused(
    open_registry: Open, routing: Make, tmp_path: Path
) -> None:
    registry = open_registry(lock_timeout=0.2)
    registry.create("t", routing(1))
    with connect(tmp_path / "data") as raw:
        raw.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="locked"):
            registry.create("u", routing(2))
        assert 0.15 < time.monotonic() - started < 5
        assert registry.get("t").id == "t"  # readers go on
        raw.execute("ROLLBACK")
    assert registry.create("u", routing(2)).id == "u"


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written(
    open_registry: Open, routing: Make, tmp_path: Path
) -> None:
    registry = open_registry()
    task = registry.create("t", routing(1), metadata={"a": 1})
    a = {name: torch.randn(4096, 64) for name in ("m.0.q", "m.1.q")}
    b = {name: torch.randn(64, 4096) for name in a}
    content = PrivateAdapter(a, b)
    with file_size_limit(1 << 20):
        with pytest.raises(RegistryUnavailable):
            registry.create("u", content)
        with pytest.raises(RegistryUnavailable):
            registry.replace("t", content)
    assert registry.list()[0] == [task]
    assert registry.content_bytes("t") == routing(1).to_safetensors()
    assert rows_of(tmp_path / "data", "contents") == 1
    assert registry.create("u", content).kind == "private"


def test_contents_are_shared_and_dropped_with_their_last_task(
    open_registry: Open, routing: Make, tmp_path: Path
) -> None:
    registry = open_registry(restore_seconds=0, kept_versions=0)
    data = tmp_path / "data"
    registry.create("t", routing(1), metadata={"a": 1})
    registry.create("u", routing(1))
    registry.copy("t", "v")
    assert rows_of(data, "contents") == rows_of(data, "sketches") == 1
    registry.replace("t", routing(2))
    assert rows_of(data, "contents") == rows_of(data, "sketches") == 2
    registry.delete("u")
    assert rows_of(data, "contents") == 2
    registry.delete("v")
    assert rows_of(data, "contents") == 1
    registry.delete("t")
    for table in ("contents", "sketches", "labels", "tasks", "versions"):
        assert rows_of(data, table) == 0


def test_a_task_of_a_small_model_takes_under_64_kb(open_registry: Open, tmp_path: Path) -> None:
    modules = tuple(f"model.layers.{block}.m{n}" for block in range(30) for n in range(7))
    layout = Layout(modules, heads=8, skills=8)
    registry = open_registry(layout=layout)
    for number in range(100):
        logits = torch.randn(layout.shape("module"))
        registry.create(f"task-{number}", Routing.checked(logits, layout), metadata={"n": number})
    registry.close()
    size = (tmp_path / "data" / FILE_NAME).stat().st_size
    assert 210 * 8 * 8 * 4 < size / 100 <= 64_000
