"""Factories for small registries and what is kept in them."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from postgres_server import PostgresServer

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Granularity, Layout, Routing, RoutingKind, fold
from polyhead.server.tasks.models import metadata
from polyhead.server.tasks.options import Options
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.sql import Database

INVENTORY = "1" * 64


@pytest.fixture
def layout() -> Layout:
    """Four modules in two blocks, 2 heads, 4 skills."""
    return Layout(("m.0.q", "m.0.v", "m.1.q", "m.1.v"), heads=2, skills=4)


@pytest.fixture
def routing(layout: Layout) -> Callable[..., Routing]:
    """Makes a routing that differs from that of every other seed."""

    def make(
        seed: int, kind: RoutingKind = "logits", granularity: Granularity = "module"
    ) -> Routing:
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(layout.shape(granularity), generator=generator)
        values = logits if kind == "logits" else fold(logits)
        return Routing.checked(values, layout, kind, granularity)

    return make


@pytest.fixture
def private() -> PrivateAdapter:
    """A private adapter of two modules with different ranks."""
    a = {"m.0.q": torch.randn(8, 2), "m.1.v": torch.randn(8, 3)}
    b = {"m.0.q": torch.randn(2, 6), "m.1.v": torch.randn(3, 6)}
    return PrivateAdapter(a, b)


@pytest.fixture(scope="session")
def shared_database(postgresql: PostgresServer) -> str:
    """The URL of one database with the registry's tables: to empty it is faster than to make it."""
    url = postgresql.new_database()
    with tempfile.TemporaryDirectory() as folder:
        Database(Path(folder), lock_timeout=5, url=url).close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None for SQLite in the test's folder; every test of the registry holds on both."""
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("shared_database")
    tables = ", ".join(metadata.tables)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY".encode())
    return url


@pytest.fixture
def open_registry(
    tmp_path: Path, layout: Layout, database_url: str | None
) -> Iterator[Callable[..., Registry]]:
    """Opens the registry of this test, as often as wanted; further options are `Options`'."""
    opened: list[Registry] = []

    def open_one(
        kind: type[Registry] = Registry,
        inventory: str = INVENTORY,
        layout: Layout = layout,
        **options: Any,
    ) -> Registry:
        chosen = Options(**{"database_url": database_url, **options})
        opened.append(kind(tmp_path / "data", inventory, layout, chosen))
        return opened[-1]

    yield open_one
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Callable[..., Registry]) -> Registry:
    return open_registry()
