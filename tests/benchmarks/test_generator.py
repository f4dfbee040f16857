"""What the report says of tasks that the inventory knows and of those that it does not."""

from io import StringIO

from rich.console import Console

from benchmarks.generator import report


def test_means_are_over_the_tasks_that_have_a_side() -> None:
    both = {"uniform": (0.0, 4.0), "bias": (0.1, 3.0), "generated": (0.5, 1.0)}
    known = {**both, "another's": (0.0, 5.0), "own": (0.75, 0.5)}
    unknown = {**both, "another's": (0.2, 6.0)}
    console = Console(file=StringIO(), width=200)
    report(console, {"plural": known, "singular": unknown})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (mean,) = [line for line in text.splitlines() if "mean" in line]
    assert "0.500 (1.00)" in mean
    assert "0.100 (5.50)" in mean
    assert "0.750 (0.50)" in mean
    (missing,) = [line for line in text.splitlines() if "singular" in line]
    assert "–" in missing
