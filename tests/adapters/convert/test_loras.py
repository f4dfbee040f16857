"""PEFT's own LoRA models are the oracle of an inventory made of them."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_model
from oracles import FORMS
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.convert.loras import inventory_from_loras
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import RoutedTask, use_plan
from polyhead.adapters.routing import Routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

EXACT, DIFFERENT = 1e-5, 1e-2
ATTENTION = ["q_proj", "v_proj"]


def trained(model: PreTrainedModel, folder: Path, seed: int, **options: Any) -> Path:
    """A PEFT LoRA folder with strong random A and B."""
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION} | options
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    wrapped.save_pretrained(folder)
    return folder


def served(bare: PreTrainedModel, inventory: Inventory, routing: Routing, ids: Tensor) -> Tensor:
    """Logits under one routing, each form once; they must agree."""
    found = []
    task = RoutedTask("t", routing.weights(inventory.layout))
    for costs in FORMS.values():
        injection = inject(bare, inventory, costs)
        with use_plan(injection.plan([task], [ids.shape[1]])):
            found.append(bare(input_ids=ids, use_cache=False).logits)
        injection.remove()
    assert all((one - found[0]).abs().max() < EXACT for one in found)
    return found[0]


def ids_of(seed: int = 3) -> Tensor:
    return torch.randint(1, 250, (1, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("scalings", ["equal", "different"])
def test_each_lora_answers_as_peft_serves_it(tmp_path: Path, scalings: str) -> None:
    bare = tiny_model()
    other = (
        {"target_modules": ["q_proj", "up_proj"]}
        if scalings == "equal"
        else {"use_rslora": True, "alpha_pattern": {"q_proj": 2}, "target_modules": ["q_proj"]}
    )
    folders = {
        "one": trained(bare, tmp_path / "one", 1),
        "two": trained(bare, tmp_path / "two", 2, **other),
    }
    inventory = inventory_from_loras(folders, bare, "tiny")
    assert (inventory.header.heads, inventory.header.skills) == (1, 2)
    assert inventory.header.scaling == (2.0 if scalings == "equal" else 1.0)
    answers = {n: served(bare, inventory, inventory.tasks[n], ids_of()) for n in folders}
    for name, folder in folders.items():
        peft = PeftModel.from_pretrained(copy.deepcopy(bare), folder).eval()
        wanted = peft(input_ids=ids_of()).logits
        wrong = answers["two" if name == "one" else "one"]
        assert (answers[name] - wanted).abs().max() < EXACT
        assert (wrong - wanted).abs().max() > DIFFERENT


def linear_by_definition(
    bare: PreTrainedModel, folders: list[Path], weights: list[float], split: bool
) -> PreTrainedModel:
    """The bare model with `(sum w A)(sum w B)` added: LoRAX's `linear` merge as it is written.

    split: each LoRA's scaling is its own and goes to A and B by its square root.
    """
    from safetensors.torch import load_file

    merged = copy.deepcopy(bare)
    read = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    names = {key.rsplit(".lora_", 1)[0] for one in read for key in one}
    for name in names:
        a: Any = 0
        b: Any = 0
        for one, config, w in zip(read, configs, weights, strict=True):
            scaling = config["lora_alpha"] / config["r"]
            factor = math.sqrt(scaling) if split else 1.0
            a = a + w * factor * one[f"{name}.lora_A.weight"]
            b = b + w * factor * one[f"{name}.lora_B.weight"]
        common = 1.0 if split else configs[0]["lora_alpha"] / configs[0]["r"]
        layer: Any = merged.get_submodule(name.removeprefix("base_model.model."))
        layer.weight += common * b @ a
    return merged


@torch.no_grad()
@pytest.mark.parametrize("alphas", [(6, 6), (6, 12)])
def test_a_mixture_is_the_linear_merge_of_lorax_and_of_peft(
    tmp_path: Path, alphas: tuple[int, int]
) -> None:
    bare = tiny_model()
    folders = [trained(bare, tmp_path / f"t{i}", i, lora_alpha=alphas[i]) for i in range(2)]
    inventory = inventory_from_loras({f.name: f for f in folders}, bare, "tiny")
    weights = [0.3, 0.7]
    mixture = Routing.from_nested([weights], inventory.layout, "weights", "model")
    here = served(bare, inventory, mixture, ids_of())
    lorax = linear_by_definition(bare, folders, weights, split=alphas[0] != alphas[1])
    assert (here - lorax(input_ids=ids_of()).logits).abs().max() < EXACT

    peft = PeftModel.from_pretrained(copy.deepcopy(bare), folders[0], adapter_name="t0")
    peft.load_adapter(folders[1], adapter_name="t1")

    def by_peft(name: str, given: list[float]) -> Tensor:
        peft.add_weighted_adapter(["t0", "t1"], given, name, combination_type="linear")
        peft.set_adapter(name)
        logits: Tensor = peft.eval()(input_ids=ids_of()).logits
        return logits

    # PEFT gives A and B the root of each weight, so that weights w² give w to both.
    assert (here - by_peft("same", [w**2 for w in weights])).abs().max() < EXACT
    rooted = by_peft("other", weights)
    assert (here - rooted).abs().max() > DIFFERENT
    roots = [[math.sqrt(w) for w in weights]]
    coefficients = Routing.from_nested(roots, inventory.layout, "coefficients", "model")
    assert (served(bare, inventory, coefficients, ids_of()) - rooted).abs().max() < EXACT


def test_what_cannot_be_one_inventory_is_refused_by_name(tmp_path: Path) -> None:
    bare = tiny_model()
    one = trained(bare, tmp_path / "one", 1)
    taller = trained(bare, tmp_path / "taller", 2, r=4)
    wider = trained(bare, tmp_path / "wider", 3, target_modules=["q_proj", "k_proj", "v_proj"])
    dora = trained(bare, tmp_path / "dora", 4, use_dora=True)
    with pytest.raises(ConversionError, match=r"taller.*rank 3 as .*one.*found rank 4"):
        inventory_from_loras({"a": one, "b": taller}, bare, "tiny")
    with pytest.raises(ConversionError, match=r"one: 2 modules .*left bare"):
        inventory_from_loras({"a": one, "b": wider}, bare, "tiny", missing="refuse")
    assert len(inventory_from_loras({"a": one, "b": wider}, bare, "tiny").header.modules) == 6
    with pytest.raises(ConversionError, match=r"dora: adapter_config\.use_dora"):
        inventory_from_loras({"a": one, "b": dora}, bare, "tiny")
    with pytest.raises(ConversionError, match=r"nowhere.*adapter_config\.json"):
        inventory_from_loras({"a": tmp_path / "nowhere"}, bare, "tiny")
    with pytest.raises(ConversionError, match=r"one: the backbone has no such module"):
        inventory_from_loras({"a": one}, tiny_model("gpt2"), "tiny")
    with pytest.raises(ConversionError, match="reserved"):
        inventory_from_loras({"base": one}, bare, "tiny")
