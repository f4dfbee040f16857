"""Nearest routings, against comparing every pair exactly."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.sketch import SKETCH_WIDTH, Sketcher, closest, direction

Make = Callable[..., Routing]
WIDE = Layout(tuple(f"m.{block}.q" for block in range(40)), heads=4, skills=8)


def drawn(seed: int, layout: Layout = WIDE) -> torch.Tensor:
    return torch.randn(layout.shape("module"), generator=torch.Generator().manual_seed(seed))


def test_the_planted_neighbour_is_found_among_many(
    open_registry: Callable[..., Registry],
) -> None:
    registry = open_registry(layout=WIDE)
    for seed in range(200):
        registry.create(f"t{seed:03}", Routing.checked(drawn(seed), WIDE))
    near = 0.7 * drawn(42) + 0.7 * drawn(1000)
    registry.create("planted", Routing.checked(near, WIDE))
    (first, cosine), (_, second) = registry.similar("t042", limit=2)
    assert first == "planted"
    exact = direction(Routing(drawn(42)), WIDE) @ direction(Routing(near), WIDE)
    assert cosine == pytest.approx(float(exact), abs=1e-6)
    assert second < 0.2 < 0.6 < cosine
    assert registry.similar("planted", limit=1)[0][0] == "t042"
    assert registry.similar("t043", limit=1)[0][0] != "planted"


def test_order_and_cosines_are_exact(registry: Registry, routing: Make, layout: Layout) -> None:
    shapes = [("logits", "module"), ("weights", "block"), ("logits", "model")]
    made = {f"t{n}": routing(n, *shapes[n % 3]) for n in range(12)}
    for name, content in made.items():
        registry.create(name, content)
    own = direction(made["t5"], layout)
    exact = {name: float(own @ direction(content, layout)) for name, content in made.items()}
    del exact["t5"]
    found = registry.similar("t5", limit=4)
    assert [name for name, _ in found] == sorted(exact, key=lambda name: -exact[name])[:4]
    assert dict(found) == pytest.approx({name: exact[name] for name, _ in found}, abs=1e-6)


def test_copies_are_neighbours_and_private_adapters_are_not(
    registry: Registry, routing: Make, private: PrivateAdapter
) -> None:
    registry.create("t", routing(1))
    registry.create("private", private)
    registry.copy("t", "v")
    registry.copy("t", "u", template="{input}")
    found = registry.similar("t")
    assert [name for name, _ in found] == ["u", "v"]
    assert [cosine for _, cosine in found] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_the_average_has_no_neighbours(registry: Registry, routing: Make, layout: Layout) -> None:
    registry.create("average", Routing.uniform(layout))
    registry.create("zero", Routing.checked(torch.zeros(layout.shape("module")), layout))
    registry.create("t", routing(1))
    assert registry.similar("average") == registry.similar("zero") == []
    assert dict(registry.similar("t")) == {"average": 0.0, "zero": 0.0}


def test_nearly_equal_routings_keep_their_direction(layout: Layout) -> None:
    # A task fitted for a few steps is within 1e-3 of the average and has a direction all the same.
    small = Routing.checked(1e-3 * drawn(1, layout), layout)
    large = Routing.checked(1e-1 * drawn(1, layout), layout)
    other = Routing.checked(1e-3 * drawn(2, layout), layout)
    assert float(direction(small, layout) @ direction(large, layout)) > 0.99
    assert abs(float(direction(small, layout) @ direction(other, layout))) < 0.9


def test_sketches_estimate_cosines(layout: Layout) -> None:
    sketcher = Sketcher(WIDE)
    vectors = [direction(Routing(drawn(seed)), WIDE) for seed in range(60)]
    sketches = np.stack([np.frombuffer(sketcher.sketch(v), "<f4") for v in vectors])
    error = sketches @ sketches.T - np.stack(vectors) @ np.stack(vectors).T
    assert sketches.shape == (60, SKETCH_WIDTH)
    assert error.std() < 1.5 / SKETCH_WIDTH**0.5
    others = [sketcher.sketch(vector) for vector in vectors]
    assert closest(others[7], others, count=1) == [7]
    assert Sketcher(layout).sketch(direction(Routing(drawn(1, layout)), layout)) != others[1]


def test_sketches_are_what_stored_ones_were() -> None:
    """Sketches on disk are compared with new ones: changing how they are made needs a migration."""
    vector = np.arange(1, 1281, dtype=np.float32)
    stored = np.frombuffer(Sketcher(WIDE).sketch(vector), "<f4")
    assert stored[:6].tolist() == [-1684.0, -2230.0, 1662.0, 1748.0, 631.0, -1008.0]
