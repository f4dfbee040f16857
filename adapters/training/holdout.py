"""Which examples a fit learns from and which it is scored on."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

FEW = 24
"""Below this many examples a single held-out part is too small to trust: every example takes a
turn at being held out instead."""
FOLDS = 4
FRACTION = 0.25


@dataclass(frozen=True)
class Split:
    """Indices of the examples to learn from and of those to score on; both in ascending order."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split(keys: Sequence[Hashable], fraction: float, seed: int) -> Split:
    """Hold out about `fraction` of the examples, at least one and never all.

    keys: one for each example; examples with equal keys (the same input twice) stay on one side.
    Raises `ValueError` when there are fewer than two different keys.
    """
    parts = _parts(keys, seed)
    wanted = min(len(keys) - 1, max(1, round(len(keys) * fraction)))
    held: list[int] = []
    for part in parts[:-1]:
        if len(held) >= wanted:
            break
        held += part
    return _without(len(keys), held)


def k_folds(keys: Sequence[Hashable], folds: int, seed: int) -> tuple[Split, ...]:
    """`folds` splits whose held-out parts cover every example exactly once, as evenly as possible.

    Fewer splits when there are fewer different keys. Raises `ValueError` as `split` does, and when
    folds is below 2.
    """
    if folds < 2:
        raise ValueError(f"folds: expected at least 2, found {folds}")
    parts = _parts(keys, seed)
    held: list[list[int]] = [[] for _ in range(min(folds, len(parts)))]
    for part in sorted(parts, key=len, reverse=True):
        min(held, key=len).extend(part)
    return tuple(_without(len(keys), one) for one in held)


def choose_splits(
    keys: Sequence[Hashable], fraction: float | None, folds: int | None, seed: int
) -> tuple[Split, ...]:
    """What the caller asked for; without a wish, k-fold for few examples and one split for many.

    Fewer than two different keys cannot be split: then there are no splits, and no score.
    """
    if len(set(keys)) < 2:
        return ()
    if folds is not None:
        return k_folds(keys, folds, seed)
    if fraction is not None:
        return (split(keys, fraction, seed),)
    return k_folds(keys, FOLDS, seed) if len(keys) < FEW else (split(keys, FRACTION, seed),)


def _parts(keys: Sequence[Hashable], seed: int) -> list[list[int]]:
    """Indices with equal keys together, the groups in an order drawn from the seed."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise ValueError(f"expected at least 2 different inputs to split, found {len(groups)}")
    parts = list(groups.values())
    random.Random(seed).shuffle(parts)
    return parts


def _without(count: int, held: Sequence[int]) -> Split:
    out = set(held)
    return Split(tuple(i for i in range(count) if i not in out), tuple(sorted(out)))
