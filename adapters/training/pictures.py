"""Drawings of an inventory's tasks: their weights, how alike they are, which skills they use."""

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.training.canvas import figure, save

SHOWN_LABELS = 30
"""Names beside a heat map before they would overlap; of more, every n-th is written."""


def draw_all(tasks: Mapping[str, Routing], layout: Layout, folder: Path) -> list[Path]:
    """One heat map a task, the map of similarities and the use of skills, as PNG in `folder`.

    Returns the paths in the order they were written.
    """
    weights = {name: routing.weights(layout) for name, routing in tasks.items()}
    paths = [folder / f"weights-{name}.png" for name in weights]
    for path, (name, own) in zip(paths, weights.items(), strict=True):
        draw_weights(name, own, layout, path)
    if weights:
        paths += [folder / "similarity.png", folder / "skills.png"]
        draw_similarity(weights, paths[-2])
        draw_usage(weights, paths[-1])
    return paths


def similarity(weights: Mapping[str, Tensor]) -> Tensor:
    """Cosine of every two tasks' weights `[M, H, S]`, each less the uniform 1/S: `[T, T]` float32.

    Without the uniform part all tasks would look alike: weights are positive. A task that is
    uniform everywhere has no direction and a similarity of 0 to every other, 1 to itself.
    """
    flat = torch.stack([own.flatten() - 1 / own.shape[-1] for own in weights.values()])
    unit = torch.nn.functional.normalize(flat, dim=-1)
    alike = unit @ unit.T
    alike.fill_diagonal_(1.0)
    return alike


def usage(weights: Tensor) -> Tensor:
    """Mean weight of each skill over modules and heads: `[S]` of `[M, H, S]`, summing to 1."""
    return weights.mean((0, 1))


def sharpness(weights: Tensor) -> float:
    """0 for uniform weights, 1 where every head of every module uses one skill alone.

    One less the mean entropy over its maximum; one skill alone has nothing to choose: 0.
    """
    if weights.shape[-1] == 1:
        return 0.0
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
    return 1 - float(entropy) / log(weights.shape[-1])


def draw_weights(name: str, weights: Tensor, layout: Layout, path: Path) -> None:
    """Module by head × skill: a row for each module in the model's order, heads side by side."""
    modules, heads, skills = weights.shape
    canvas, (axis,) = figure(1, width=3 + 0.12 * heads * skills, height=2 + 0.06 * modules)
    image = axis.imshow(
        weights.reshape(modules, heads * skills).numpy(),
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap="magma",
    )
    for head in range(1, heads):
        axis.axvline(head * skills - 0.5, color="white", lw=0.6)
    _label(axis.set_yticks, [_short(module) for module in layout.modules])
    axis.set_xticks([head * skills + (skills - 1) / 2 for head in range(heads)], range(heads))
    axis.set_xlabel(f"head, and its {skills} skills from left to right")
    axis.set_title(f"{name}: weights, sharpness {sharpness(weights):.2f}")
    canvas.colorbar(image, ax=axis, label="weight")
    save(canvas, path)


def draw_similarity(weights: Mapping[str, Tensor], path: Path) -> None:
    """Tasks by tasks, those that are alike brought together."""
    alike, names = similarity(weights), list(weights)
    order = _neighbouring(alike)
    side = 3 + 0.22 * len(names)
    canvas, (axis,) = figure(1, width=side + 1, height=side)
    image = axis.imshow(alike[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    _label(axis.set_yticks, [names[i] for i in order])
    _label(axis.set_xticks, [names[i] for i in order], rotation=90)
    axis.set_title("similarity of tasks (cosine of weights less 1/S)")
    canvas.colorbar(image, ax=axis, shrink=0.8)
    save(canvas, path)


def draw_usage(weights: Mapping[str, Tensor], path: Path) -> None:
    """Tasks by skills: how much of each skill a task uses on the average."""
    use = torch.stack([usage(own) for own in weights.values()])  # [T, S]
    canvas, (axis,) = figure(1, width=3.5 + 0.3 * use.shape[1], height=1.5 + 0.22 * len(use))
    image = axis.imshow(use.numpy(), aspect="auto", vmin=0, cmap="magma")
    _label(axis.set_yticks, list(weights))
    axis.set_xticks(range(use.shape[1]))
    axis.set_xlabel("skill")
    axis.set_title("mean weight over modules and heads")
    canvas.colorbar(image, ax=axis)
    save(canvas, path)


def _neighbouring(alike: Tensor) -> list[int]:
    """An order of tasks in which each is followed by the likest of those that are left."""
    order, left = [0], set(range(1, len(alike)))
    while left:
        order.append(max(left, key=lambda i: float(alike[order[-1], i])))
        left.remove(order[-1])
    return order


def _label(set_ticks: Any, names: list[str], **how: Any) -> None:
    step = -(-len(names) // SHOWN_LABELS)
    places = range(0, len(names), step)
    set_ticks(list(places), [names[place] for place in places], fontsize=7, **how)


def _short(module: str) -> str:
    """The block's number and the layer's own name: what tells modules of one model apart."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1]}".strip()
