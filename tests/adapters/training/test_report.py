"""Tables and plots of measurements."""

from pathlib import Path

import pytest

from polyhead.adapters.training.report import Measured, averages, document, plot, spread, table

SEEDS = {"plural": (0.5, 0.7, 0.6), "past": (0.1, 0.1, 0.1)}


def measurements() -> list[Measured]:
    found = [
        Measured(name, True, "z", "exact", seed, value)
        for name, values in SEEDS.items()
        for seed, value in enumerate(values)
    ]
    return [*found, Measured("plural", True, "base", "exact", 0, 0.25)]


def test_a_table_has_medians_spreads_and_averages_over_tasks() -> None:
    rows = table(measurements()).splitlines()
    assert rows[0] == "| task | z | base |"
    assert rows[2] == "| plural | 60.0 (50.0–70.0) | 25.0 |"
    assert rows[3] == "| past | 10.0 | – |"
    assert rows[4] == "| **average** | **35.0 (30.0–40.0)** | **25.0** over 1 of 2 |"


def test_averages_are_over_tasks_within_a_seed() -> None:
    own = [m for m in measurements() if m.system == "z"]
    assert averages(own) == pytest.approx([0.3, 0.4, 0.35])


def test_equal_seeds_need_no_spread() -> None:
    assert spread([0.5, 0.5]) == "50.0"
    assert spread([0.5, 0.25, 1.0]) == "50.0 (25.0–100.0)"


def test_training_and_held_out_tasks_are_apart() -> None:
    training = Measured("gender", False, "z", "rank", 0, 1.0)
    text = document([*measurements(), training], "Scores", ["A fact."])
    assert text.startswith("# Scores\n\nA fact.\n")
    training_part, held_out_part = text.split("## Held-out tasks: exact match")
    assert "## Training tasks: rank classification" in training_part
    assert "gender" not in held_out_part
    assert "plural" not in training_part


def test_a_plot_is_a_picture_of_the_figures(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / name for name in ("a.png", "b.png", "c.png")]
    better = [*measurements()[1:], Measured("plural", True, "z", "exact", 0, 1.0)]
    for path, found in zip(paths, (measurements(), measurements(), better), strict=True):
        plot(found, path)
    first, again, other = (path.read_bytes() for path in paths)
    assert first.startswith(b"\x89PNG")
    assert first == again
    assert first != other
