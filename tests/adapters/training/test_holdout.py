"""Splits of examples: what is learned from is never scored on."""

import pytest

from polyhead.adapters.training.holdout import FEW, choose_splits, k_folds, split

WORDS = [f"word {n}" for n in range(20)]


def test_one_split_covers_all_and_shares_nothing() -> None:
    found = split(WORDS, 0.25, seed=3)
    assert len(found.held_out) == 5
    assert sorted(found.train + found.held_out) == list(range(20))
    assert found == split(WORDS, 0.25, seed=3)
    assert found != split(WORDS, 0.25, seed=4)


@pytest.mark.parametrize("folds", [2, 3, 4, 20])
def test_folds_hold_out_every_example_once(folds: int) -> None:
    found = k_folds(WORDS, folds, seed=0)
    assert len(found) == folds
    assert sorted(i for one in found for i in one.held_out) == list(range(20))
    sizes = {len(one.held_out) for one in found}
    assert max(sizes) - min(sizes) <= 1
    for one in found:
        assert sorted(one.train + one.held_out) == list(range(20))


def test_the_same_input_stays_on_one_side() -> None:
    keys = ["same", "a", "same", "b", "same", "c"]
    splits = [*k_folds(keys, 3, seed=1), *(split(keys, 0.3, seed) for seed in range(9))]
    for one in splits:
        assert len({keys[i] in ("same",) and i in one.held_out for i in (0, 2, 4)}) == 1
    assert any(0 in one.held_out for one in splits)
    assert any(0 in one.train for one in splits)


def test_few_examples_take_turns_and_many_do_not() -> None:
    few, many = WORDS[: FEW - 1][:12], [f"word {n}" for n in range(FEW)]
    assert len(choose_splits(few, None, None, 0)) == 4
    assert len(choose_splits(many, None, None, 0)) == 1
    assert len(choose_splits(many, None, 3, 0)) == 3
    assert len(choose_splits(few, 0.5, None, 0)) == 1
    assert len(choose_splits(["a", "b"], None, None, 0)) == 2


def test_what_cannot_be_split_is_not() -> None:
    assert choose_splits(["same", "same"], None, None, 0) == ()
    assert choose_splits(["one"], None, 4, 0) == ()
    with pytest.raises(ValueError, match="at least 2 different inputs"):
        split(["same", "same"], 0.5, 0)
    with pytest.raises(ValueError, match="folds: expected at least 2, found 1"):
        k_folds(WORDS, 1, 0)
