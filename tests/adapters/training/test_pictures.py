"""Drawings of routings, and the figures behind them."""

from pathlib import Path

import pytest
import torch

from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.training.pictures import draw_all, sharpness, similarity, usage

LAYOUT = Layout(("blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj"), heads=2, skills=4)


def leaning(skill: int) -> Routing:
    weights = torch.full(LAYOUT.shape("module"), 0.1)
    weights[..., skill] = 0.7
    return Routing.checked(weights, LAYOUT, "weights")


def test_similar_tasks_are_near_one_and_opposite_ones_below_zero() -> None:
    tasks = {"a": leaning(0), "b": leaning(0), "c": leaning(3), "even": Routing.uniform(LAYOUT)}
    found = similarity({name: routing.weights(LAYOUT) for name, routing in tasks.items()})
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] < 0
    assert found[3].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-5)


def test_usage_and_sharpness() -> None:
    weights = leaning(2).weights(LAYOUT)
    assert usage(weights).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])
    even = Routing.uniform(LAYOUT).weights(LAYOUT)
    alone = torch.zeros_like(even)
    alone[..., 1] = 1
    assert sharpness(even) == pytest.approx(0, abs=1e-6)
    assert sharpness(alone) == pytest.approx(1)
    assert 0 < sharpness(weights) < 1
    assert sharpness(torch.ones(3, 2, 1)) == 0


def test_every_task_and_both_maps_are_drawn(tmp_path: Path) -> None:
    paths = draw_all({"a": leaning(0), "b": leaning(1)}, LAYOUT, tmp_path)
    names = ["weights-a.png", "weights-b.png", "similarity.png", "skills.png"]
    assert [path.name for path in paths] == names
    pictures = [path.read_bytes() for path in paths]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_an_inventory_without_tasks_has_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_all({}, LAYOUT, tmp_path) == []
