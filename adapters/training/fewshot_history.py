"""The held-out scores of a fit as it goes: when it was best, when to stop, what it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

WORST = 1e9
"""Stands for a loss that overflowed, which could not be compared."""


@dataclass
class History:
    """Every scoring of one task: for each held-out example whether it was right, and its loss."""

    steps: list[int] = field(default_factory=list)
    right: list[list[bool]] = field(default_factory=list)  # [scoring][held-out example]
    losses: list[list[float]] = field(default_factory=list)

    def add(self, step: int, right: Sequence[bool], losses: Sequence[float]) -> None:
        self.steps.append(step)
        self.right.append(list(right))
        self.losses.append([loss if isfinite(loss) else WORST for loss in losses])

    @property
    def best(self) -> int:
        """Which scoring was best: by exact matches, and of equals by the loss."""
        return max(range(len(self.steps)), key=lambda e: self._rank(e, None))

    @property
    def improved(self) -> bool:
        """Whether the last scoring is the best so far."""
        return self.best == len(self.steps) - 1

    @property
    def last(self) -> float | None:
        """Exact match at the last scoring."""
        return sum(self.right[-1]) / len(self.right[-1]) if self.right else None

    def exhausted(self, patience: int) -> bool:
        """No improvement for `patience` scorings, or nothing left to improve twice in a row."""
        if not self.steps:
            return False
        if len(self.steps) - 1 - self.best >= patience:
            return True
        return len(self.steps) > 1 and all(self.right[-1]) and all(self.right[-2])

    @property
    def score(self) -> float | None:
        """Exact match that new examples can be expected to have.

        Each example is scored at the step that the *others* would have chosen: taking the best of
        several scorings by the very examples they are scored on would flatter the fit.
        """
        if not self.steps:
            return None
        count = len(self.right[0])
        chosen = [max(range(len(self.steps)), key=lambda e: self._rank(e, i)) for i in range(count)]
        return sum(self.right[e][i] for i, e in enumerate(chosen)) / count

    def _rank(self, scoring: int, without: int | None) -> tuple[int, float]:
        right, losses = self.right[scoring], self.losses[scoring]
        if without is None:
            return sum(right), -sum(losses)
        return sum(right) - right[without], losses[without] - sum(losses)
