"""Small real things for the tests of training."""

import random

import torch
from factories import byte_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.inject import find_modules
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.routing import Layout
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoded, Encoder
from polyhead.adapters.training.factors import Source
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import RoutedSource
from polyhead.adapters.training.trainable import Trainable

HEADS, SKILLS, RANK, SCALING = 4, 3, 2, 1.5


def words(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefgh", k=chance.randint(2, longest))) for _ in range(count)]


def examples(tasks: int = 3, each: int = 4, seed: int = 0) -> list[Example]:
    """Task i repeats a word's letter i times: unlike lengths, unlike tasks."""
    found = words(tasks * each, seed)
    return [Example(f"t{i % tasks}", w, w[: 1 + i % tasks] * 2) for i, w in enumerate(found)]


def encoded(given: list[Example]) -> tuple[list[Encoded], list[int]]:
    return Encoder(byte_tokenizer()).encode(given), [int(e.task[1:]) for e in given]


def strengthen(module: nn.Module, std: float = 0.4, seed: int = 5) -> None:
    """Give every trained number a value that matters, so that wrong routing shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def routed(modules: list[ModuleShape], tasks: int, **options: object) -> RoutedSource:
    """A source of shared skills and logits, both far from their start."""
    skills = SharedSkills.fresh(modules, HEADS, SKILLS, RANK)
    layout = layout_of(modules)
    source = RoutedSource(skills, Routings(layout, tasks, **options))  # type: ignore[arg-type]
    strengthen(source)
    with torch.no_grad():
        source.routings.logits.mul_(8)
    return source


def layout_of(modules: list[ModuleShape]) -> Layout:
    return Layout(tuple(m.name for m in modules), HEADS, SKILLS)


def trainable(model: PreTrainedModel, source: Source | None = None, **options: bool) -> Trainable:
    modules = find_modules(model, heads=HEADS)
    return Trainable(model, modules, source or routed(modules, 3), SCALING, **options)


def plain_losses(logits: Tensor, one: Encoded) -> Tensor:
    """The definition: mean cross-entropy of one unpadded example's answer."""
    start = len(one.prompt) - 1
    rows = logits[0, start : start + len(one.answer)].log_softmax(-1)
    return -rows[torch.arange(len(one.answer)), torch.tensor(one.answer)].mean()
