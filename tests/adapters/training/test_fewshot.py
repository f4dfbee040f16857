"""Joint fits: each task as if alone, interrupted and resumed, cancelled, and chosen between."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from factories import byte_tokenizer, random_task
from fit_world import WORDS, always_q, first_letter, task, world
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.errors import BackboneMismatch
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import fold
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder, pack
from polyhead.adapters.training.errors import CheckpointError, DataError
from polyhead.adapters.training.fewshot import (
    FitInterrupted,
    FitProgress,
    FitResult,
    FitTask,
    fit,
)
from polyhead.adapters.training.fewshot_types import TrainedMethod
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import PrivateSource, RoutedSource
from polyhead.adapters.training.trainable import Trainable

TOLERANCE = 2e-4
METHODS: tuple[TrainedMethod, ...] = ("z", "mhr", "mu", "lora")


def numbers(result: FitResult) -> Tensor:
    """Everything a fit has learned, in one vector."""
    if result.routing is not None:
        return result.routing.values.flatten()
    private = result.private
    assert private is not None
    return torch.cat([part[n].flatten() for part in (private.a, private.b) for n in sorted(part)])


def loss_of(
    model: PreTrainedModel, inventory: Inventory, result: FitResult, wanted: FitTask
) -> float:
    """Mean loss over a task's examples with what was fitted, computed apart from the fit."""
    modules, scaling = inventory.header.modules, inventory.header.scaling
    source: RoutedSource | PrivateSource
    if result.routing is not None:
        routings = Routings(inventory.layout, 1)
        routings.logits.data[0] = result.routing.values
        source = RoutedSource(SharedSkills.of(inventory), routings)
    else:
        assert result.private is not None
        source = PrivateSource.of(modules, [result.private.a], [result.private.b])
        scaling = 1.0
    encoded = Encoder(byte_tokenizer(), wanted.template).encode(wanted.examples)
    trainable = Trainable(model, modules, source, scaling)
    try:
        with torch.no_grad():
            return float(trainable(pack(encoded, [0] * len(encoded))).mean())
    finally:
        trainable.detach()


class Watch:
    """Records progress and interrupts or cancels at a given moment."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[FitProgress] = []
        self.passes = 0
        self._stop_after = stop_after

    def report(self, progress: FitProgress) -> None:
        self.seen.append(progress)

    def pause(self) -> None:
        if self.passes == self._stop_after:
            raise FitInterrupted
        self.passes += 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_of_what_it_is_given(method: TrainedMethod) -> None:
    model, inventory = world()
    wanted = task("always", always_q, method=method, steps=30)
    (before,) = fit(
        model,
        inventory,
        byte_tokenizer(),
        [task("always", always_q, method=method, steps=1, rate=1e-9, logits_rate=1e-9)],
    )
    (after,) = fit(model, inventory, byte_tokenizer(), [wanted])
    assert after.method == method
    assert (after.routing is None) == (method != "z")
    losses = [loss_of(model, inventory, one, wanted) for one in (before, after)]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_backbone_teaches_float32_numbers_the_same(method: TrainedMethod) -> None:
    """Judged by the float32 backbone; the control is what the other task has learned."""
    model, inventory = world()
    half = copy.deepcopy(model).bfloat16()
    tasks = [
        task("always", always_q, method=method, steps=30),
        task("first", first_letter, method=method, steps=30),
    ]
    own, other = fit(half, inventory, byte_tokenizer(), tasks)
    (whole,) = fit(model, inventory, byte_tokenizer(), tasks[:1])
    assert numbers(own).dtype == torch.float32
    losses = [loss_of(model, inventory, one, tasks[0]) for one in (own, whole, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1, abs=0.02)
    assert losses[0] < 0.7 * losses[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_task_learns_the_same_alone_and_beside_others(method: TrainedMethod) -> None:
    model, inventory = world()
    tasks = [
        task("first", first_letter, method=method, folds=2),
        task("always", always_q, 11, method=method, holdout=0.3, seed=5),
        task("bare", always_q, 1, method=method),
    ]
    together = fit(model, inventory, byte_tokenizer(), tasks, micro_tokens=64)
    for found, one in zip(together, tasks, strict=True):
        (alone,) = fit(model, inventory, byte_tokenizer(), [one])
        difference = (numbers(found) - numbers(alone)).abs().max()
        assert difference < TOLERANCE
        assert found.score == alone.score
        # Control: one other answer teaches something that the tolerance tells apart.
        odd = replace(one.examples[0], output="zz")
        other = replace(one, examples=(odd, *one.examples[1:]))
        (control,) = fit(model, inventory, byte_tokenizer(), [other])
        assert (numbers(found) - numbers(control)).abs().max() > 10 * TOLERANCE


def test_the_same_seed_repeats_and_another_does_not() -> None:
    model, inventory = world()
    first, again, other = (
        numbers(
            fit(model, inventory, byte_tokenizer(), [task("t", first_letter, method="z", seed=s)])[
                0
            ]
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("method", "stop_after"), [("z", 2), ("mhr", 7), ("lora", 7)])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(
    method: TrainedMethod, stop_after: int, tmp_path: Path
) -> None:
    model, inventory = world()
    tasks = [task("first", first_letter, method=method), task("always", always_q, method=method)]
    fit_these = partial(fit, model, inventory, byte_tokenizer(), tasks, micro_tokens=200)
    whole = fit_these()
    path = tmp_path / "state.safetensors"
    with pytest.raises(FitInterrupted):
        fit_these(pause=Watch(stop_after).pause, state_file=path)
    resumed = Watch()
    found = fit_these(report=resumed.report, pause=resumed.pause, state_file=path)
    for one, other in zip(whole, found, strict=True):
        assert torch.equal(numbers(one), numbers(other))
        assert one.score == other.score
    steps = [p.step for p in resumed.seen]
    assert steps[0] == (1 if stop_after == 2 else 2)
    # Once all is done, the file answers without computing anything.
    idle = Watch(0)
    again = fit(model, inventory, byte_tokenizer(), tasks, pause=idle.pause, state_file=path)
    assert [numbers(one).tolist() for one in again] == [numbers(one).tolist() for one in found]


def test_who_is_cancelled_while_a_fit_rests_does_not_keep_the_others_from_going_on(
    tmp_path: Path,
) -> None:
    model, inventory = world()
    tasks = [task("gone", always_q, method="z"), task("stays", first_letter, method="lora")]
    path = tmp_path / "state.safetensors"
    fit_these = partial(fit, model, inventory, byte_tokenizer(), tasks, state_file=path)
    with pytest.raises(FitInterrupted):
        fit_these(pause=Watch(2).pause)
    found = fit_these(cancelled=lambda name: name == "gone")
    (alone,) = fit(model, inventory, byte_tokenizer(), tasks[1:])
    assert [one.task for one in found] == ["stays"]
    assert (numbers(found[0]) - numbers(alone)).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_method_that_overflowed_is_not_tried_again_after_an_interruption(tmp_path: Path) -> None:
    model, inventory = world()
    wild = {name: tensor * 1e30 for name, tensor in inventory.b.items()}
    inventory = Inventory(inventory.header, inventory.a, wild)
    path = tmp_path / "state.safetensors"
    tasks = [task("t", always_q, 1)]
    fit_it = partial(fit, model, inventory, byte_tokenizer(), tasks, state_file=path)
    watch, resumed = Watch(), Watch()

    def pause() -> None:
        if watch.seen:  # z has overflowed at its first step, and this is mu's
            raise FitInterrupted

    with pytest.raises(FitInterrupted):
        fit_it(report=watch.report, pause=pause)
    assert fit_it(report=resumed.report) == []
    assert {p.method for p in watch.seen} == {"z"}
    assert {p.method for p in resumed.seen} == {"mu"}


def test_the_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    model, inventory = world()
    path = tmp_path / "state.safetensors"

    def fit_for(steps: int) -> None:
        wanted = [task("t", always_q, method="z", steps=steps)]
        fit(model, inventory, byte_tokenizer(), wanted, state_file=path)

    fit_for(1)
    with pytest.raises(CheckpointError, match="belongs to another fit"):
        fit_for(2)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit_for(1)


def test_a_cancelled_task_leaves_and_the_others_do_not_notice() -> None:
    model, inventory = world()
    tasks = [task("gone", always_q, method="z"), task("first", first_letter, method="z")]
    watch = Watch()

    def cancelled(name: str) -> bool:
        return name == "gone" and any(p.step == 3 for p in watch.seen)

    found = fit(model, inventory, byte_tokenizer(), tasks, report=watch.report, cancelled=cancelled)
    assert [one.task for one in found] == ["first"]
    assert max(p.step for p in watch.seen if p.task == "gone") == 3
    (alone,) = fit(model, inventory, byte_tokenizer(), tasks[1:])
    assert (numbers(found[0]) - numbers(alone)).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_fit_that_overflows_has_no_result_and_harms_nobody() -> None:
    model, inventory = world()
    wild = task("wild", first_letter, method="lora", rate=100.0, steps=40, holdout=0.3, patience=40)
    calm = task("calm", first_letter, method="lora", rate=0.001)
    examples = wild.examples
    found = fit(model, inventory, byte_tokenizer(), [wild, calm])
    assert len(examples) == 8
    assert found[-1].task == "calm"
    (alone,) = fit(model, inventory, byte_tokenizer(), [calm])
    assert (numbers(found[-1]) - numbers(alone)).abs().max() < TOLERANCE


def test_the_backbone_is_given_back_as_it_was() -> None:
    model, inventory = world()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    fit(model, inventory, byte_tokenizer(), [task("t", always_q)])
    watch = Watch(3)
    with pytest.raises(FitInterrupted):
        fit(model, inventory, byte_tokenizer(), [task("t", always_q)], pause=watch.pause)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds


def test_auto_tries_an_adapter_where_the_routing_falls_short() -> None:
    model, inventory = world()
    hard = task("first", first_letter, method="auto", steps=12)
    easy = task("always", always_q, 11, steps=60, batch_examples=8, holdout=0.3, patience=6)
    found = {one.task: one for one in fit(model, inventory, byte_tokenizer(), [hard, easy])}
    tried = {name: [m.method for m in one.methods] for name, one in found.items()}
    assert tried["first"] == ["z", "mu", "prompted"]
    assert tried["always"] == ["z", "prompted"]
    for one in found.values():
        best = {m.method: m.score for m in one.methods}
        assert one.score == max(best[m] or 0.0 for m in best if m != "prompted")
        assert (one.score > best["prompted"]) == (one.task == "always")
        assert one.prompted_score == best["prompted"]
        assert one.seconds == pytest.approx(sum(m.seconds for m in one.methods))


def test_progress_tells_step_loss_and_score() -> None:
    model, inventory = world()
    watch = Watch()
    fit(model, inventory, byte_tokenizer(), [task("t", always_q, method="z")], report=watch.report)
    assert [p.step for p in watch.seen] == [1, 2, 3, 4, 5, 6]
    assert {(p.task, p.method, p.steps) for p in watch.seen} == {("t", "z", 6)}
    assert watch.seen[-1].loss < watch.seen[0].loss
    assert watch.seen[-1].score is not None


def test_micro_steps_are_small_and_change_nothing() -> None:
    model, inventory = world()
    wanted = [task("t", first_letter, method="z"), task("u", always_q, method="z")]
    coarse, fine = Watch(), Watch()
    one = fit(model, inventory, byte_tokenizer(), wanted, pause=coarse.pause, micro_tokens=4096)
    other = fit(model, inventory, byte_tokenizer(), wanted, pause=fine.pause, micro_tokens=16)
    assert fine.passes > 5 * coarse.passes
    for a, b in zip(one, other, strict=True):
        assert (numbers(a) - numbers(b)).abs().max() < TOLERANCE


def test_one_example_gives_a_fit_without_a_score() -> None:
    model, inventory = world()
    (found,) = fit(model, inventory, byte_tokenizer(), [task("t", always_q, 1)])
    assert (found.method, found.score, found.prompted_score) == ("z", None, None)


def test_what_cannot_be_fitted_is_named() -> None:
    model, inventory = world()
    twice = [task("t", always_q), task("t", first_letter)]
    with pytest.raises(DataError, match="same name"):
        fit(model, inventory, byte_tokenizer(), twice)
    odd = FitTask("odd", (Example("odd", "cat", "c"), Example("odd", "cat", "d")))
    with pytest.raises(DataError, match=r"odd: examples\[1\].output.*another answer"):
        fit(model, inventory, byte_tokenizer(), [task("fine", always_q), odd])
    other = inventory.header.backbone.model_copy(update={"fingerprint": "0" * 64})
    header = inventory.header.model_copy(update={"backbone": other})
    with pytest.raises(BackboneMismatch):
        fit(model, Inventory(header, inventory.a, inventory.b), byte_tokenizer(), [])


def test_a_fitted_routing_is_what_serving_folds() -> None:
    """The logits that come out are those whose weights the layers were trained with."""
    model, inventory = world()
    (found,) = fit(model, inventory, byte_tokenizer(), [task("t", always_q, method="z", steps=20)])
    assert found.routing is not None
    weights = found.routing.weights(inventory.layout)
    assert torch.equal(weights, fold(found.routing.values))
    assert (weights - random_task(inventory, "r", 1).weights).abs().max() > 0.1
    assert len(WORDS) == 11
