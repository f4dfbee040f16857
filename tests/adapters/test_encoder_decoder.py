"""T5 in both of its forms: every row of a mixed batch is what its merged model answers alone."""

import pytest
import torch
from factories import VOCAB, random_task, tiny_model, tiny_t5
from oracles import COMBINED, FACTORED, distance, merged
from torch import Tensor

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.encoder_decoder import IGNORED, EncoderDecoder
from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import find_modules, inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.plan import Adapter

NEW = 12
EXACT = 1e-4
DIFFERENT = 0.1
LENGTHS = [9, 4, 7, 6]
KINDS = ["relu", "gated-gelu"]  # T5; T5 1.1, Flan-T5, T0 and mT5


class World:
    """A backbone, tasks for four rows, and their sources of different lengths."""

    def __init__(self, kind: str, costs: FormCosts, factor: float = 1.0) -> None:
        self.bare = tiny_t5(kind, factor)
        modules = find_modules(self.bare, heads=4)
        reference = BackboneRef.of(self.bare, "tiny")
        self.inventory = Inventory.random(reference, modules, heads=4, skills=3, rank=2, std=0.5)
        a, b = (random_task(self.inventory, key, seed) for key, seed in [("a", 1), ("b", 2)])
        self.tasks: list[Adapter] = [a, None, b, a]
        model = merged(self.bare, self.inventory, None)
        self.served = EncoderDecoder(model, inject(model, self.inventory, costs))
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(2, VOCAB, (4, max(LENGTHS)), generator=generator)
        self.mask = torch.tensor([[int(i < n) for i in range(max(LENGTHS))] for n in LENGTHS])
        self.ids *= self.mask

    def source(self, row: int) -> Tensor:
        return self.ids[row : row + 1, : LENGTHS[row]]

    def alone(self, row: int, task: Adapter) -> list[int]:
        model = merged(self.bare, self.inventory, task)
        found = model.generate(self.source(row), max_new_tokens=NEW, do_sample=False)
        return [int(token) for token in found[0, 1:]]


@pytest.fixture(params=[(k, c) for k in KINDS for c in (FACTORED, COMBINED)])
def world(request: pytest.FixtureRequest) -> World:
    return World(*request.param)


def test_logits_of_every_step_on_given_targets(world: World) -> None:
    """Token by token against the merged model's one pass, on targets that do not repeat."""
    targets = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[: 4 * NEW]
    targets = targets.view(4, NEW)
    encoded = world.served.encode(world.ids, world.mask, world.tasks)
    cache = encoded.cache()
    steps = [world.served.decode(encoded, targets[:, i : i + 1], cache) for i in range(NEW)]
    found = torch.cat(steps, dim=1)
    for row, task in enumerate(world.tasks):
        for other in world.tasks[:3]:
            model = merged(world.bare, world.inventory, other)
            expected = model(world.source(row), decoder_input_ids=targets[row : row + 1]).logits[0]
            far = [distance(found[row, i], expected[i]) for i in range(NEW)]
            assert max(far) < EXACT if other is task else min(far) > DIFFERENT


def test_without_its_mask_a_padded_source_answers_otherwise(world: World) -> None:
    start = world.ids.new_zeros(4, 1)
    encoded = world.served.encode(world.ids, torch.ones_like(world.mask), world.tasks)
    found = world.served.decode(encoded, start, encoded.cache())
    for row, task in enumerate(world.tasks):
        model = merged(world.bare, world.inventory, task)
        expected = model(world.source(row), decoder_input_ids=start[:1]).logits[0]
        assert (distance(found[row], expected) < EXACT) == (row == 0)  # the one without padding


@pytest.mark.parametrize("costs", [FACTORED, COMBINED], ids=["factored", "combined"])
def test_greedy_answers_of_a_mixed_batch(costs: FormCosts) -> None:
    world = World("gated-gelu", costs, factor=8.0)
    found = world.served.greedy(world.served.encode(world.ids, world.mask, world.tasks), NEW)
    expected = [world.alone(row, task) for row, task in enumerate(world.tasks)]
    assert found == expected
    assert all(len(set(answer)) > len(answer) // 2 for answer in expected)
    for row, wrong in enumerate([world.tasks[2], world.tasks[0], None, None]):
        assert world.alone(row, wrong) != expected[row]


def test_losses_are_those_of_a_plain_loop_over_labels(world: World) -> None:
    lengths = [3, 5, 1, 4]
    labels = world.ids.flip(1)[:, :5].clamp(min=2)
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    encoded = world.served.encode(world.ids, world.mask, world.tasks)
    found = world.served.losses(encoded, labels)

    def plain(row: int, task: Adapter) -> Tensor:
        model = merged(world.bare, world.inventory, task)
        gold = labels[row : row + 1, : lengths[row]]
        loss: Tensor = model(input_ids=world.source(row), labels=gold).loss
        return loss

    expected = torch.stack([plain(row, task) for row, task in enumerate(world.tasks)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row, wrong in enumerate([world.tasks[2], world.tasks[0], None, None]):
        assert abs(float(plain(row, wrong) - expected[row])) > 0.01


def test_another_family_is_refused_by_name() -> None:
    model = tiny_model("llama")
    reference = BackboneRef.of(model, "tiny")
    inventory = Inventory.random(reference, find_modules(model), heads=1, skills=2, rank=1)
    with pytest.raises(InjectionError) as caught:
        EncoderDecoder(model, inject(model, inventory))
    error = caught.value
    assert (error.field, error.found, error.expected) == ("model_type", "llama", "t5 or mt5")
