"""Merged LoRAs beside PEFT's own merges and beside what a merge must keep."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.convert.merging import Method, merge_loras
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.materialise import peft_folder
from polyhead.adapters.private import PrivateAdapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

EXACT, DIFFERENT, RANK = 1e-5, 1e-2, 4


def trained(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    wrapped.save_pretrained(folder)
    return folder


def shuffled(source: Path, folder: Path) -> Path:
    """The same function: components in another order, of other signs and other scales."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    order, factor = torch.tensor([2, 0, 3, 1]), torch.tensor([-2.0, 0.5, -0.25, 3.0])
    turned = {}
    for name, tensor in tensors.items():
        if "lora_A" in name:
            turned[name] = tensor[order] * factor[:, None]
        else:
            turned[name] = (tensor[:, order] / factor).contiguous()
    save_file(turned, folder / "adapter_model.safetensors")
    return folder


def products(adapter: PrivateAdapter) -> Tensor:
    return torch.cat([(adapter.a[n] @ adapter.b[n]).flatten() for n in sorted(adapter.a)])


def test_transport_finds_the_same_function_in_another_order(tmp_path: Path) -> None:
    model = tiny_model()
    first = trained(model, tmp_path / "first", 1)
    loras = {"first": first, "second": shuffled(first, tmp_path / "second")}
    alone = products(merge_loras({"first": first}, model, "mean"))
    assert (products(merge_loras(loras, model, "ot")) - alone).abs().max() < EXACT
    assert (products(merge_loras(loras, model, "mean")) - alone).abs().max() > DIFFERENT


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", "ties"])
def test_a_merge_is_the_one_of_peft_and_is_served_by_it(tmp_path: Path, method: Method) -> None:
    model = tiny_model()
    folders = [trained(model, tmp_path / f"t{i}", i) for i in range(3)]
    merged = merge_loras({f.name: f for f in folders}, model, method, density=0.6)
    (tmp_path / "out").mkdir()
    for name, data in peft_folder(merged, "tiny").items():
        (tmp_path / "out" / name).write_bytes(data)
    ids = torch.randint(1, 250, (1, 9), generator=torch.Generator().manual_seed(3))
    here = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")(ids).logits

    peft: Any = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="t0")
    for folder in folders[1:]:
        peft.load_adapter(folder, adapter_name=folder.name)
    # PEFT multiplies A and B by the root of weight times scaling.
    weight = 1 / 9 if method == "mean" else 1.0
    kind = {"mean": "linear", "ties": "ties"}[method]
    options = {"density": 0.6} if method == "ties" else {}
    names = [folder.name for folder in folders]
    peft.add_weighted_adapter(names, [weight] * 3, "all", combination_type=kind, **options)
    peft.set_adapter("all")
    wanted = peft(ids).logits
    assert (here - wanted).abs().max() < 1e-4
    peft.set_adapter("t1")
    assert (here - peft(ids).logits).abs().max() > DIFFERENT


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_dare_drops_at_random_what_its_seed_says(tmp_path: Path) -> None:
    model = tiny_model()
    loras = {f"t{i}": trained(model, tmp_path / f"t{i}", i) for i in range(2)}
    before = torch.random.get_rng_state()
    one, again, other = (
        products(merge_loras(loras, model, "dare", density=0.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    whole = products(merge_loras(loras, model, "dare", density=1.0))
    torch.testing.assert_close(whole, products(merge_loras(loras, model, "mean")))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    one = trained(model, tmp_path / "one", 1)
    with pytest.raises(ConversionError, match=r"density.*above 0.*found 0"):
        merge_loras({"one": one}, model, "ties", density=0.0)
    with pytest.raises(ConversionError, match=r"nowhere"):
        merge_loras({"one": one, "two": tmp_path / "nowhere"}, model, "ot")
