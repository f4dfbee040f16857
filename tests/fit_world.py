"""Small fits that several tests run."""

from collections.abc import Callable
from typing import Any

from factories import tiny_inventory, tiny_model
from transformers import PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.fewshot import FitOptions, FitTask

WORDS = ("cat", "dog", "tree", "house", "moon", "river", "stone", "bird", "fish", "lamp", "wood")


def world() -> tuple[PreTrainedModel, Inventory]:
    model = tiny_model()
    return model, tiny_inventory(model)


def task(name: str, answer: Callable[[str], str], count: int = 8, **options: Any) -> FitTask:
    """A task over the first words; few steps unless told."""
    examples = tuple(Example(name, word, answer(word)) for word in WORDS[:count])
    return FitTask(name, examples, options=FitOptions(**{"steps": 6, **options}))


def first_letter(word: str) -> str:
    return word[0]


def always_q(_word: str) -> str:
    return "q"
