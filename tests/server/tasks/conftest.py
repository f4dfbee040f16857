"""Factories for small registries and what is kept in them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Granularity, Layout, Routing, RoutingKind, fold
from polyhead.server.tasks.registry import Registry

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


@pytest.fixture
def open_registry(tmp_path: Path, layout: Layout) -> Iterator[Callable[..., Registry]]:
    """Opens the registry of this test's folder, as often as wanted."""
    opened: list[Registry] = []

    def open_one(
        kind: type[Registry] = Registry,
        inventory: str = INVENTORY,
        layout: Layout = layout,
        lock_timeout: float = 5.0,
    ) -> Registry:
        opened.append(kind(tmp_path / "data", inventory, layout, lock_timeout=lock_timeout))
        return opened[-1]

    yield open_one
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Callable[..., Registry]) -> Registry:
    return open_registry()
