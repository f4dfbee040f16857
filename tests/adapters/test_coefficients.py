"""Signed, unnormalised routings in one batch with all other kinds of tasks."""

import copy

import pytest
import torch
from factories import random_private, random_task, tiny_inventory, tiny_model
from oracles import FORMS, merged
from torch import Tensor

from polyhead.adapters.errors import RoutingError
from polyhead.adapters.inject import inject
from polyhead.adapters.plan import Adapter, RoutedTask, use_plan
from polyhead.adapters.routing import Granularity, Routing

EXACT, DIFFERENT = 1e-4, 1e-2
INVENTORY_SEEDS: dict[Granularity, int] = {"module": 1, "block": 2, "model": 3}


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of both signs, in rows that sum to anything."""
    return 0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_batch_computes_what_each_task_alone_does(form: str) -> None:
    model = tiny_model()
    inventory = tiny_inventory(model)
    layout = inventory.layout
    routings = {
        granularity: Routing.checked(
            drawn(layout.shape(granularity), seed), layout, "coefficients", granularity
        )
        for granularity, seed in INVENTORY_SEEDS.items()
    }
    adapters: list[Adapter] = [
        *(RoutedTask(name, routing.weights(layout)) for name, routing in routings.items()),
        random_task(inventory, "weights", 4),
        random_private(inventory, 5),
        None,
    ]
    ids = torch.randint(1, 250, (len(adapters), 7), generator=torch.Generator().manual_seed(0))
    wanted = [
        merged(model, inventory, adapter)(input_ids=row[None]).logits[0]
        for adapter, row in zip(adapters, ids, strict=True)
    ]
    injection = inject(model, inventory, FORMS[form])

    def served(order: list[Adapter]) -> Tensor:
        with use_plan(injection.plan(order, [7] * len(order))):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    assert (served(adapters) - torch.stack(wanted)).abs().max() < EXACT
    # Coefficients that were taken for weights would be normalised, those taken for logits folded.
    for spoilt in ("normalised", "folded", "turned"):
        wrong = list(adapters)
        for index, routing in enumerate(routings.values()):
            w = routing.weights(layout)
            changed = {
                "normalised": w.abs() / w.abs().sum(-1, keepdim=True),
                "folded": Routing(routing.values, "logits", routing.granularity).weights(layout),
                "turned": -w.flip(-1),
            }[spoilt]
            wrong[index] = RoutedTask(f"{spoilt}-{index}", changed)
        distance = (served(wrong)[:3] - torch.stack(wanted[:3])).abs().amax((1, 2))
        assert distance.min() > DIFFERENT


@torch.no_grad()
def test_a_linear_hyper_network_is_an_inventory_and_its_embedding_a_task() -> None:
    """A LoRA that `nn.Linear` makes of a task's embedding: its columns and its bias are skills."""
    model = tiny_model()
    inventory = tiny_inventory(model, heads=1, skills=5)
    embedding = drawn((4,), 6)
    generated = {}
    for module in inventory.header.modules:
        sides = {}
        for letter, skills in (("a", inventory.a), ("b", inventory.b)):
            columns = skills[module.name][0].flatten(1)  # [S, I*r] or [S, r*O]
            generator = torch.nn.Linear(4, columns.shape[1])
            generator.weight.copy_(columns[:4].T)
            generator.bias.copy_(columns[4])
            sides[letter] = generator(embedding)
        a = sides["a"].view(module.in_features, inventory.header.rank)
        generated[module.name] = a @ sides["b"].view(inventory.header.rank, module.out_features)
    rows = [[*embedding.tolist(), 1.0]]
    routing = Routing.from_nested(rows, inventory.layout, "coefficients", "model")
    task = RoutedTask("generated", routing.weights(inventory.layout))
    ids = torch.randint(1, 250, (1, 7), generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(model)
    for name, delta in generated.items():
        wanted.get_submodule(name).weight += delta.T
    injection = inject(model, inventory)
    with use_plan(injection.plan([task, None], [7, 7])):
        found = model(input_ids=ids.repeat(2, 1), use_cache=False).logits
    assert (found[0] - wanted(input_ids=ids).logits[0]).abs().max() < EXACT
    assert (found[1] - found[0]).abs().max() > DIFFERENT


def test_coefficients_survive_their_file() -> None:
    layout = tiny_inventory(tiny_model()).layout
    for granularity, seed in INVENTORY_SEEDS.items():
        given = drawn(layout.shape(granularity), seed)
        routing = Routing.checked(given, layout, "coefficients", granularity)
        again = Routing.from_safetensors(routing.to_safetensors(), layout)
        assert (again.kind, again.granularity) == ("coefficients", granularity)
        assert torch.equal(again.values, given)
        assert again.fingerprint == routing.fingerprint
        assert Routing(given, "logits", granularity).fingerprint != routing.fingerprint


@pytest.mark.parametrize(
    ("value", "expected"),
    [(float("nan"), "a finite number"), (float("inf"), "a finite number"), (1e5, "65504")],
)
def test_unusable_numbers_are_named(value: float, expected: str) -> None:
    layout = tiny_inventory(tiny_model()).layout
    values = torch.zeros(layout.shape("module"))
    values[2, 1, 3] = value
    with pytest.raises(RoutingError) as caught:
        Routing.checked(values, layout, "coefficients")
    assert caught.value.field == "routing.coefficients[2][1][3]"
    assert expected in caught.value.expected
    with pytest.raises(RoutingError) as caught:
        Routing.checked(values[:3], layout, "coefficients")
    assert caught.value.field == "routing.coefficients"
    assert caught.value.found == "[3, 4, 4]"
