"""The parts of a fit: checking examples, drawing, scoring over time, the optimiser."""

import dataclasses

import pytest
import torch
from factories import byte_tokenizer
from torch import nn

from polyhead.adapters.training.answers import Encoded, micro_batches
from polyhead.adapters.training.data import Example, Message
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import ConfigError
from polyhead.adapters.training.fewshot_adam import BETAS, CLIP, EPSILON, Owned, OwnersAdam
from polyhead.adapters.training.fewshot_check import check_examples
from polyhead.adapters.training.fewshot_history import History
from polyhead.adapters.training.fewshot_runs import Learner, Prepared, learners_of
from polyhead.adapters.training.fewshot_types import FitOptions
from polyhead.adapters.training.holdout import k_folds

ENCODER = Encoder(byte_tokenizer(), max_tokens=20)


def pairs(*texts: tuple[str, str]) -> list[Example]:
    return [Example("t", asked, answer) for asked, answer in texts]


def tokens(count: int, length: int = 4) -> tuple[Encoded, ...]:
    return tuple(Encoded((i,) * (length - 1), (0,)) for i in range(count))


def test_sound_examples_have_no_problems() -> None:
    assert check_examples(pairs(("a", "b"), ("c", "b"), ("a", "b")), ENCODER) == []


def test_every_wrong_example_is_named_by_its_index() -> None:
    examples = pairs(("a", "b"), (" ", "b"), ("c", "\n"), ("x" * 30, "y"), ("a", "B"), ("d", "e"))
    found = check_examples(examples, ENCODER)
    assert [(one.index, one.field) for one in found] == [
        (1, "input"),
        (2, "output"),
        (3, ""),
        (4, "output"),
    ]
    assert "33 tokens" in found[2].found
    assert "examples[0]" in found[3].message
    assert str(found[2]).count("expected") == 1
    assert str(found[0]) == (
        "examples[1].input: empty; expected a text that is not blank; found ' '"
    )


def test_too_many_and_too_few_examples() -> None:
    (many,) = check_examples(pairs(*((str(i), "x") for i in range(5))), ENCODER, limit=4)
    assert (many.index, many.found) == (4, "5 examples")
    (none,) = check_examples([], ENCODER)
    assert none.message == "no examples"


def test_conversations_contradict_each_other_only_as_a_whole() -> None:
    ask, other = (
        (Message("system", text), Message("user", "hello")) for text in ("be short", "be long")
    )
    alike = [Example("t", "hello", "a", messages=ask), Example("t", "hello", "b", messages=other)]
    wide = Encoder(byte_tokenizer())
    assert check_examples(alike, wide) == []
    (found,) = check_examples([alike[0], dataclasses.replace(alike[0], output="b")], wide)
    assert (found.index, found.field) == (1, "output")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("steps", 0),
        ("rate", 0.0),
        ("logits_rate", float("nan")),
        ("holdout", 1.0),
        ("folds", 1),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: out of range"):
        FitOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing beside holdout"):
        FitOptions(folds=2, holdout=0.5)


def test_an_epoch_draws_every_example_once_before_any_again() -> None:
    learner = Learner(tokens(10), (), FitOptions(batch_examples=4, seed=3))
    drawn = [one.prompt[0] for step in range(5) for one in learner.draw(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    other = Learner(tokens(10), (), FitOptions(batch_examples=4, seed=4))
    assert [one.prompt[0] for one in other.draw(0)] != drawn[:4]
    few = Learner(tokens(2), (), FitOptions(batch_examples=4))
    assert len(few.draw(0)) == 2


def test_no_learner_sees_what_it_is_scored_on() -> None:
    splits = k_folds(list(range(6)), 3, seed=0)
    task = Prepared("t", tokens(6), splits, FitOptions())
    learners, (run,) = learners_of([task])
    assert len(learners) == 4
    for number in run.scored:
        assert set(learners[number].examples).isdisjoint(learners[number].held_out)
    assert learners[run.keeper].examples == task.encoded
    assert sum(len(learners[n].held_out) for n in run.scored) == 6


def test_micro_batches_keep_learners_whole_where_they_fit() -> None:
    work = {0: tokens(3), 1: tokens(3), 2: tokens(9)}
    parts = micro_batches(work, 24)
    assert [[owner for owner, _ in part] for part in parts] == [
        [0, 0, 0, 1, 1, 1],
        [2] * 6,
        [2] * 3,
    ]
    assert [len(part) for part in micro_batches({0: tokens(2, 50)}, 24)] == [1, 1]


def test_a_perfect_score_seen_by_chance_is_not_believed() -> None:
    """Two scorings, each right on its own half: choosing by the others gives nothing."""
    history = History()
    history.add(1, [True, False], [0.1, 5.0])
    history.add(2, [False, True], [5.0, 0.1])
    assert history.score == 0.0
    assert max(sum(right) for right in history.right) == 1


def test_the_best_scoring_is_by_matches_and_then_by_loss() -> None:
    history = History()
    history.add(10, [True, False, False], [0.1, 2.0, 2.0])
    assert history.improved
    history.add(20, [True, False, True], [0.5, 2.0, 0.5])
    history.add(30, [True, True, False], [0.1, 0.5, 2.0])
    assert (history.best, history.improved) == (2, True)
    history.add(40, [True, True, False], [0.1, 0.5, float("nan")])
    assert (history.best, history.improved) == (2, False)
    assert not history.exhausted(2)
    history.add(50, [False, False, False], [9.0, 9.0, 9.0])
    assert history.exhausted(2)
    assert history.last == 0.0


def test_nothing_is_left_to_learn_after_two_perfect_scorings() -> None:
    history = History()
    assert not history.exhausted(3)
    history.add(1, [True, True], [0.2, 0.2])
    assert not history.exhausted(3)
    history.add(2, [True, True], [0.1, 0.1])
    assert history.exhausted(3)


def test_each_owners_step_is_adam_with_its_own_clipping() -> None:
    torch.manual_seed(0)
    shapes = ((3, 4, 2), (5, 3, 2))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    owned = [Owned("p", parameters[0], 0), Owned("q", parameters[1], 1)]
    gradients = [torch.randn(shape) for shape in shapes]
    gradients[0][1] *= 1000  # one owner's gradient explodes
    alone = [[one.slice(i).requires_grad_() for one in owned] for i in range(3)]
    rates = torch.tensor([0.1, 0.2, 0.0])
    for i, own in enumerate(alone):
        if not rates[i]:
            continue
        adam = torch.optim.Adam(own, lr=float(rates[i]), betas=BETAS, eps=EPSILON)
        for _ in range(3):
            own[0].grad, own[1].grad = gradients[0][i].clone(), gradients[1][:, i].clone()
            nn.utils.clip_grad_norm_(own, CLIP)
            adam.step()
    before = owned[0].slice(2)
    together = OwnersAdam(owned)
    for count in (1, 2, 3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        together.step(count, [rates, rates])
    for i, own in enumerate(alone):
        assert torch.allclose(owned[0].slice(i), own[0], atol=1e-5)
        assert torch.allclose(owned[1].slice(i), own[1], atol=1e-5)
    assert torch.equal(owned[0].slice(2), before)
    assert not torch.allclose(owned[0].slice(0), before)
