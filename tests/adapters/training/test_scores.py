"""Scores of single answers."""

import pytest

from polyhead.adapters.training.scores import (
    ChoiceScore,
    best_choice,
    exact_match,
    ranked_right,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "wanted", "exact", "f1"),
    [
        ("walked", "walked", 1, 1),
        (" walked\n", "walked", 1, 1),
        ("Walked", "walked", 0, 1),
        ("the red house", "red house", 0, 0.8),
        ("red red house", "red house", 0, 0.8),
        ("ran", "walked", 0, 0),
        ("", "walked", 0, 0),
        ("", "", 1, 1),
    ],
)
def test_exact_match_and_f1(answer: str, wanted: str, exact: float, f1: float) -> None:
    assert exact_match(answer, wanted) == exact
    assert token_f1(answer, wanted) == pytest.approx(f1)


def test_a_long_choice_wins_by_its_mean() -> None:
    short, long = ChoiceScore(-2.0, 1), ChoiceScore(-3.0, 4)
    assert best_choice([short, long]) == 1
    assert short.logprob > long.logprob  # the sum alone would have chosen otherwise
    assert ranked_right([short, long], 1) == 1.0
    assert ranked_right([short, long], 0) == 0.0


def test_the_first_of_equal_choices_is_taken() -> None:
    assert best_choice([ChoiceScore(-2.0, 2), ChoiceScore(-1.0, 1)]) == 0
