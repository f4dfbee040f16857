"""A warm start: the nearest known task is found, and a fit that begins there is ahead."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from factories import byte_tokenizer
from fit_world import WORDS, always_q, first_letter, task, world
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Routing, fold
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import ConfigError
from polyhead.adapters.training.fewshot import FitInterrupted, FitTask, fit
from polyhead.adapters.training.fewshot_runs import Learner
from polyhead.adapters.training.fewshot_types import FitOptions
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import RoutedSource
from polyhead.adapters.training.trainable import Trainable
from polyhead.adapters.training.warm_start import _Search, logits_of, starts

QUICK = {"method": "z", "holdout": 0.3, "patience": 99}


def twice(word: str) -> str:
    return word[:1] * 2


@pytest.fixture(scope="module")
def known() -> tuple[PreTrainedModel, Inventory]:
    """An inventory that knows two tasks that were fitted to it, one that turns away from the first
    of them, and four that are noise."""
    model, inventory = world()
    fitted = [task("q", always_q, 11, steps=40, **QUICK), task("two", twice, 11, steps=40, **QUICK)]
    for one in fit(model, inventory, byte_tokenizer(), fitted):
        assert one.routing is not None
        inventory.tasks[one.task] = one.routing
    against = -inventory.tasks["q"].values
    inventory.tasks["against"] = Routing.checked(against, inventory.layout)
    generator = torch.Generator().manual_seed(3)
    for number in range(4):
        noise = 4 * torch.randn(inventory.tasks["q"].values.shape, generator=generator)
        inventory.tasks[f"noise{number}"] = Routing.checked(noise, inventory.layout)
    return model, inventory


def losses_of(model: PreTrainedModel, inventory: Inventory, one: FitTask) -> dict[str, float]:
    """Every known task's loss on all examples, and that of uniform weights; apart from a search."""
    names = [*inventory.tasks, "uniform"]
    routings = Routings(inventory.layout, len(names))
    for number, name in enumerate(names):
        routings.logits.data[number] = 0.0
        if name != "uniform":
            routings.logits.data[number] = inventory.tasks[name].values
    source = RoutedSource(SharedSkills.of(inventory), routings)
    header = inventory.header
    trainable = Trainable(model, header.modules, source, header.scaling)
    encoded = Encoder(byte_tokenizer()).encode(one.examples)
    with torch.no_grad():
        found = [
            float(trainable(trainable.pack(encoded, [i] * len(encoded))).mean())
            for i in range(len(names))
        ]
    trainable.detach()
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(("answer", "nearest"), [(always_q, "q"), (twice, "two")])
def test_the_task_that_answers_best_is_found(
    known: tuple[PreTrainedModel, Inventory],
    answer: object,
    nearest: str,
) -> None:
    model, inventory = known
    new = task("new", answer, 11, steps=1, warm_start=True, **QUICK)  # type: ignore[arg-type]
    (found,) = fit(model, inventory, byte_tokenizer(), [new])
    losses = losses_of(model, inventory, new)
    assert found.began_from[0] == nearest == min(losses, key=lambda name: losses[name])


def test_no_task_that_is_worse_than_uniform_is_begun_from(
    known: tuple[PreTrainedModel, Inventory],
) -> None:
    """Far tasks: the fit is then the cold one, number by number."""
    model, inventory = known
    new = task("new", always_q, 11, steps=3, warm_start=True, **QUICK)
    losses = losses_of(model, inventory, new)
    assert losses["against"] > losses["uniform"] + 0.5
    far = {"against": inventory.tasks["against"]}
    alone = Inventory(inventory.header, inventory.a, inventory.b, far)
    (warm,) = fit(model, alone, byte_tokenizer(), [new])
    cold_task = replace(new, options=replace(new.options, warm_start=False))
    (cold,) = fit(model, alone, byte_tokenizer(), [cold_task])
    (near,) = fit(model, inventory, byte_tokenizer(), [new])
    assert (warm.began_from, near.began_from[0]) == ((), "q")
    assert torch.equal(logits(warm.routing), logits(cold.routing))
    assert not torch.equal(logits(near.routing), logits(cold.routing))


def logits(routing: Routing | None) -> Tensor:
    assert routing is not None
    return routing.values


def test_it_takes_a_quarter_of_the_steps_and_a_far_start_does_not(
    known: tuple[PreTrainedModel, Inventory],
) -> None:
    """Steps until the loss is what a cold start has after twenty."""
    model, inventory = known
    header = inventory.header
    encoded = tuple(Encoder(byte_tokenizer()).encode(task("t", always_q, 11).examples))
    skills = SharedSkills.of(inventory).requires_grad_(False)
    learner = Learner(encoded, (), FitOptions(method="z"))

    def steps(begin: Tensor, enough: float, most: int) -> tuple[int, float]:
        routings = Routings(inventory.layout, 1)
        routings.logits.data[0] = begin
        trainable = Trainable(model, header.modules, RoutedSource(skills, routings), header.scaling)
        optimiser = torch.optim.Adam([routings.logits], lr=0.1)
        loss = float("inf")
        for step in range(most):
            batch = trainable.pack(learner.examples, [0] * len(encoded))
            found = trainable(batch).mean()
            loss = found.item()
            if loss <= enough:
                trainable.detach()
                return step, loss
            found.backward()
            optimiser.step()
            optimiser.zero_grad()
        trainable.detach()
        return most, loss

    source = RoutedSource(skills, Routings(inventory.layout, 1))
    trainable = Trainable(model, header.modules, source, header.scaling)
    (near,) = starts(
        trainable,
        skills,
        [learner],
        inventory.tasks,
        inventory.layout,
    )
    assert trainable.source is source
    trainable.detach()
    assert near is not None
    cold = torch.zeros_like(near.logits)
    _, reached = steps(cold, 0.0, 20)
    far = logits_of(inventory.tasks["against"].weights(inventory.layout))
    assert steps(near.logits, reached, 20)[0] <= 5
    assert steps(far, reached, 40)[0] > 10


def test_slopes_and_losses_are_those_of_the_definition(
    known: tuple[PreTrainedModel, Inventory],
) -> None:
    model, inventory = known
    header = inventory.header
    skills = SharedSkills.of(inventory).requires_grad_(False)
    given = task("t", first_letter, 6)
    encoded = Encoder(byte_tokenizer()).encode(given.examples)
    source = RoutedSource(skills, Routings(inventory.layout, 1))
    trainable = Trainable(model, header.modules, source, header.scaling)
    search = _Search(trainable, skills, [encoded[:2], encoded], 64, lambda: None)
    weights = torch.stack([one.weights(inventory.layout) for one in inventory.tasks.values()])
    shortlist = torch.tensor([[0, 1], [3, 0]])
    found = search._losses(weights, shortlist, 6)
    fewer = search._losses(weights, shortlist, 2)
    losses, slopes = search._slopes(torch.full_like(weights[0], 0.25))
    step = torch.zeros_like(weights[0])
    step[3, 1, 2] = 1e-2
    moved = [search._slopes(0.25 + sign * step)[0][1] for sign in (1, -1)]
    trainable.detach()
    wanted = losses_of(model, inventory, given)
    names = list(inventory.tasks)
    assert float(found[1, 0]) == pytest.approx(wanted[names[3]], abs=1e-4)
    assert float(found[1, 1]) == pytest.approx(wanted[names[0]], abs=1e-4)
    assert abs(float(found[0, 0] - found[1, 1])) > 1e-2, "of its own examples"
    assert float(fewer[1, 1]) == pytest.approx(float(found[0, 0]), abs=1e-4)
    assert float(losses[1]) == pytest.approx(wanted["uniform"], abs=1e-4)
    slope = float(moved[0] - moved[1]) / 2e-2
    assert float(slopes[1, 3, 1, 2]) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_of_very_many_those_are_tried_that_the_slope_prefers(
    known: tuple[PreTrainedModel, Inventory],
) -> None:
    """The right one stands last among sixty of noise."""
    model, inventory = known
    generator = torch.Generator().manual_seed(9)
    shape = inventory.tasks["q"].values.shape
    noise = [8 * torch.randn(shape, generator=generator) for _ in range(60)]
    many = {f"n{i}": Routing.checked(one, inventory.layout) for i, one in enumerate(noise)}
    many["q"] = inventory.tasks["q"]
    alone = Inventory(inventory.header, inventory.a, inventory.b, many)
    new = task("new", always_q, 11, steps=1, warm_start=True, **QUICK)
    assert fit(model, alone, byte_tokenizer(), [new])[0].began_from[0] == "q"


def test_logits_fold_back_to_the_weights() -> None:
    weights = torch.softmax(
        3 * torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0)), -1
    )
    weights[0, 0] = torch.eye(8)[2]
    found = logits_of(weights)
    torch.testing.assert_close(fold(found), weights, atol=2e-3, rtol=0)
    assert found.abs().max() < 10
    assert torch.all(found.amax(-1) == 0), "where a sigmoid is steepest"


def test_what_is_scored_is_not_searched_by() -> None:
    encoded = Encoder(byte_tokenizer()).encode(task("t", always_q, 11).examples)
    learner = Learner(tuple(encoded[:6]), tuple(encoded[6:]), FitOptions())
    assert set(learner.first(8)) == set(encoded[:6])
    assert learner.first(3) == learner.draw(0)[:3]


def test_coefficients_are_passed_over(known: tuple[PreTrainedModel, Inventory]) -> None:
    model, inventory = known
    weights = inventory.tasks["q"].weights(inventory.layout)
    given = {"q": Routing.checked(weights, inventory.layout, "coefficients")}
    alone = Inventory(inventory.header, inventory.a, inventory.b, given)
    new = task("new", always_q, 11, steps=1, warm_start=True, **QUICK)
    assert fit(model, alone, byte_tokenizer(), [new])[0].began_from == ()


def test_an_interrupted_warm_fit_ends_as_if_it_had_not_been(
    known: tuple[PreTrainedModel, Inventory], tmp_path: Path
) -> None:
    model, inventory = known
    new = [task("new", always_q, 11, steps=6, warm_start=True, **QUICK)]
    fit_it = partial(fit, model, inventory, byte_tokenizer(), new, micro_tokens=64)
    whole = fit_it()
    for after in (1, 12):  # within the search, and after it
        path = tmp_path / f"{after}.safetensors"
        left = iter(range(after))

        def pause(left: object = left) -> None:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise FitInterrupted

        with pytest.raises(FitInterrupted):
            fit_it(pause=pause, state_file=path)
        (again,) = fit_it(state_file=path)
        assert again.began_from == whole[0].began_from
        assert again.began_from[0] == "q"
        assert torch.equal(logits(again.routing), logits(whole[0].routing))


def test_methods_without_a_routing_cannot_begin_from_one() -> None:
    with pytest.raises(ConfigError, match=r"warm_start.*no lora"):
        FitOptions(method="lora", warm_start=True)
    assert len(WORDS) == 11
