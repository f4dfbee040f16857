"""Routings out of embeddings, and every generator's file that is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from polyhead.adapters.errors import InventoryError, RoutingError
from polyhead.adapters.generator import (
    FACTS,
    GENERATOR_FILE,
    TENSORS,
    Generator,
    GeneratorFacts,
    piece,
    pieces,
)
from polyhead.adapters.inventory import BackboneRef, Inventory, ModuleShape

MODULES = tuple(ModuleShape(name=f"l.{i}.q", in_features=8, out_features=4) for i in range(3))
M, H, S, R, D = 3, 2, 4, 5, 6


def an_inventory(seed: int = 0) -> Inventory:
    backbone = BackboneRef(name="tiny", fingerprint="ab" * 32)
    return Inventory.random(backbone, MODULES, heads=H, skills=S, rank=2, seed=seed)


def a_generator(inventory: Inventory, seed: int = 1) -> Generator:
    chance = torch.Generator().manual_seed(seed)
    facts = GeneratorFacts(
        backbone=inventory.header.backbone.fingerprint,
        inventory=inventory.fingerprint,
        template="{input}\n",
    )
    return Generator(
        bias=torch.randn(M, H, S, generator=chance),
        left=torch.randn(M, H, S, R, generator=chance),
        right=torch.randn(R, D, generator=chance),
        mean=torch.randn(D, generator=chance),
        scale=torch.rand(D, generator=chance) + 0.5,
        facts=facts,
    )


def test_coefficients_are_the_low_rank_map_of_the_standardised_embedding() -> None:
    inventory = an_inventory()
    generator, e = a_generator(inventory), torch.linspace(-1, 2, D)
    found = generator.routing(e, inventory.layout)
    low = [
        sum(float(generator.right[r, d] * (e[d] - generator.mean[d]) / generator.scale[d])
            for d in range(D))
        for r in range(R)
    ]  # fmt: skip
    for m in range(M):
        for h in range(H):
            for s in range(S):
                wanted = float(generator.bias[m, h, s])
                wanted += sum(float(generator.left[m, h, s, r]) * low[r] for r in range(R))
                assert float(found.values[m, h, s]) == pytest.approx(wanted, abs=1e-4)
    assert (found.kind, found.granularity) == ("coefficients", "module")


def test_the_mean_embedding_gives_the_bias_and_another_one_does_not() -> None:
    inventory = an_inventory()
    generator = a_generator(inventory)
    average = generator.routing(generator.mean, inventory.layout).weights(inventory.layout)
    assert torch.equal(average, generator.bias)
    other = generator.routing(generator.mean + 1, inventory.layout).weights(inventory.layout)
    assert (other - average).abs().max() > 0.1


def test_an_embedding_out_of_bounds_is_refused() -> None:
    inventory = an_inventory()
    with pytest.raises(RoutingError, match=r"context\.coefficients"):
        a_generator(inventory).routing(torch.full((D,), 1e9), inventory.layout)


def test_a_folder_keeps_its_generator_and_its_fingerprint(tmp_path: Path) -> None:
    inventory = an_inventory()
    before = inventory.fingerprint
    inventory.save(tmp_path)
    assert Inventory.load(tmp_path).generator is None
    inventory.generator = a_generator(inventory)
    inventory.save(tmp_path)
    again = Inventory.load(tmp_path)
    assert again.fingerprint == before
    assert again.generator is not None
    for name in (*TENSORS, "facts"):
        kept, given = getattr(again.generator, name), getattr(inventory.generator, name)
        assert torch.equal(kept, given) if isinstance(kept, Tensor) else kept == given
    an_inventory(seed=9).save(tmp_path)
    assert Inventory.load(tmp_path).generator is None, "another inventory's was left"


def test_a_generator_of_other_skills_is_refused(tmp_path: Path) -> None:
    inventory, other = an_inventory(), an_inventory(seed=9)
    inventory.save(tmp_path)
    (tmp_path / GENERATOR_FILE).write_bytes(a_generator(other).to_safetensors())
    with pytest.raises(InventoryError, match="made for another inventory") as caught:
        Inventory.load(tmp_path)
    assert caught.value.field == "generator.safetensors: inventory"
    assert caught.value.found == other.fingerprint[:12]
    assert caught.value.expected == inventory.fingerprint[:12]


def test_another_width_than_the_backbones_is_refused() -> None:
    inventory = an_inventory()
    inventory.check_generator(D + 1)
    inventory.generator = a_generator(inventory)
    inventory.check_generator(D)
    with pytest.raises(InventoryError, match=f"expected width {D + 1}; found width {D}"):
        inventory.check_generator(D + 1)


Tensors = dict[str, Tensor]


def without_scale(tensors: Tensors) -> None:
    del tensors["scale"]


def with_more(tensors: Tensors) -> None:
    tensors["more"] = torch.zeros(1)


def fewer_skills(tensors: Tensors) -> None:
    tensors["left"] = tensors["left"][:, :, :-1].contiguous()


def other_rank(tensors: Tensors) -> None:
    tensors["right"] = tensors["right"][:-1].contiguous()


def flat(tensors: Tensors) -> None:
    tensors["right"] = tensors["right"].flatten()


def narrow_mean(tensors: Tensors) -> None:
    tensors["mean"] = tensors["mean"][:-1].contiguous()


def half(tensors: Tensors) -> None:
    tensors["left"] = tensors["left"].half()


def flat_bias(tensors: Tensors) -> None:
    tensors["bias"] = tensors["bias"].flatten()


def nan(tensors: Tensors) -> None:
    tensors["left"][0, 1, 2, 3] = torch.nan


def zero_scale(tensors: Tensors) -> None:
    tensors["scale"][2] = 0


@pytest.mark.parametrize(
    ("spoil", "field", "message"),
    [
        (without_scale, "", "wrong tensors"),
        (with_more, "", "wrong tensors"),
        (fewer_skills, ": left", "wrong shape or dtype"),
        (other_rank, ": left", "wrong shape or dtype"),
        (flat, ": right", "wrong shape or dtype"),
        (narrow_mean, ": mean", "wrong shape or dtype"),
        (flat_bias, ": bias", "wrong shape or dtype"),
        (half, ": left", "wrong shape or dtype"),
        (nan, ": left", "not every number is finite"),
        (zero_scale, ": scale", "unusable scale"),
    ],
)
def test_wrong_tensors_are_named(
    spoil: Callable[[Tensors], None], field: str, message: str
) -> None:
    inventory = an_inventory()
    sound = a_generator(inventory)
    inventory.read_generator(sound.to_safetensors())
    tensors = load(sound.to_safetensors())
    spoil(tensors)
    with pytest.raises(InventoryError, match=message) as caught:
        inventory.read_generator(save(tensors, {FACTS: sound.facts.model_dump_json()}))
    assert caught.value.field == GENERATOR_FILE + field


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"backbone": "cd" * 32}, "backbone"),
        ({"format": 2}, "generator.format"),
        ({"colour": "red"}, "generator.colour"),
        ({"template": None}, "generator.template"),
    ],
)
def test_wrong_facts_are_named(changes: dict[str, Any], where: str) -> None:
    inventory = an_inventory()
    data = a_generator(inventory).to_safetensors()
    facts = {**a_generator(inventory).facts.model_dump(), **changes}
    with pytest.raises(InventoryError) as caught:
        inventory.read_generator(save(load(data), {FACTS: json.dumps(facts)}))
    assert caught.value.field == f"generator.safetensors: {where}"


@pytest.mark.parametrize("data", [b"", b"\0" * 40, b"not safetensors at all"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InventoryError, match="safetensors"):
        an_inventory().read_generator(data)


def test_a_file_without_facts_is_refused() -> None:
    data = a_generator(an_inventory()).to_safetensors()
    with pytest.raises(InventoryError) as caught:
        an_inventory().read_generator(save(load(data)))
    assert caught.value.field == "generator.safetensors: generator"


def test_an_example_is_a_line_of_a_document() -> None:
    document = "\n  cat -> cats\r\n\n dog -> dogs "
    assert pieces(document) == ["cat -> cats", "dog -> dogs"]
    assert pieces(document) == [piece("cat", "cats"), piece(" dog", "dogs\n")]
