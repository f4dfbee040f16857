"""How steps to a score are counted, and what is said of a side that never comes to it."""

from io import StringIO

import pytest
from rich.console import Console

from benchmarks.warm_start import STEPS, Curve, first_step, ratio, report


def curve(task: str, side: str, *exact: float) -> Curve:
    """A curve that stays where it ends."""
    whole = [*exact, *[exact[-1]] * (len(STEPS) - len(exact))]
    return Curve(task, side, "near" if side == "warm" else "", whole, [1.0] * len(STEPS))


def test_the_first_scoring_that_is_good_enough_counts() -> None:
    assert first_step(curve("t", "cold", 0.0, 0.2, 0.5).exact, 0.5) == STEPS[2]
    assert first_step(curve("t", "cold", 0.0, 0.2).exact, 0.5) is None


def test_a_side_that_never_comes_there_counts_as_a_step_after_the_end() -> None:
    assert ratio(10, 5) == 2
    assert ratio(10, 0) == 10
    assert ratio(10, None) == pytest.approx(10 / (STEPS[-1] + 1))


def test_the_median_leaves_out_tasks_that_a_routing_does_not_learn() -> None:
    curves = [
        curve("a", "cold", 0.0, 0.1, 0.2, 0.3, 0.6),
        curve("a", "warm", 0.0, 0.6),
        curve("b", "cold", 0.0),
        curve("b", "warm", 0.9),
        curve("c", "cold", 0.0, 0.5),
        curve("c", "warm", 0.0, 0.1, 0.5),
    ]
    console = Console(file=StringIO(), width=200)
    report(console, curves)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cold over warm: median 2.75 (0.50 to 5.00) over 2 tasks" in text
    assert "learned by no routing" in text
