"""The requests that every side of a comparison answers."""

import random
from dataclasses import dataclass

VOCABULARY = 49152
"""Of the demo's backbone; prompts of random tokens are made from it."""


@dataclass(frozen=True)
class Work:
    """One request: random prompt tokens, and how many new tokens it must get."""

    prompt: tuple[int, ...]
    new_tokens: int
    task: int


def make_work(
    count: int,
    tasks: int,
    *,
    vocabulary: int,
    prompt: tuple[int, int] = (32, 128),
    new_tokens: tuple[int, int] = (32, 64),
    seed: int = 0,
) -> list[Work]:
    """`count` requests over `tasks` tasks in turn; the same ones for the same arguments."""
    draw = random.Random(seed)
    return [
        Work(
            tuple(draw.randrange(10, vocabulary) for _ in range(draw.randint(*prompt))),
            draw.randint(*new_tokens),
            index % tasks,
        )
        for index in range(count)
    ]
