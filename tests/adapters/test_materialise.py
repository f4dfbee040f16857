"""A task that was taken elsewhere answers in PEFT as it is served here."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_private, random_task, tiny_inventory, tiny_model
from oracles import FORMS
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.materialise import own_factors, peft_folder
from polyhead.adapters.peft_lora import CONFIG_FILE, WEIGHTS_FILE, read_peft_lora
from polyhead.adapters.plan import Adapter, RoutedTask, use_plan
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

EXACT = 1e-5
DIFFERENT = 1e-2


def uneven(inventory: Inventory, seed: int) -> PrivateAdapter:
    """Of ranks 1 to 4, over every other module."""
    whole = random_private(inventory, seed, rank=4)
    ranks = {name: 1 + index % 4 for index, name in enumerate(whole.a)}
    a = {name: tensor[:, : ranks[name]] for name, tensor in whole.a.items()}
    b = {name: tensor[: ranks[name]] for name, tensor in whole.b.items()}
    return PrivateAdapter.checked(a, b, inventory.header.modules, scaling=0.7)


def signed_task(inventory: Inventory, seed: int) -> RoutedTask:
    """With coefficients at granularity `model`."""
    layout = inventory.layout
    drawn = 0.4 * torch.randn(layout.shape("model"), generator=torch.Generator().manual_seed(seed))
    return RoutedTask(
        "signed", Routing.checked(drawn, layout, "coefficients", "model").weights(layout)
    )


def in_peft(adapter: Adapter, inventory: Inventory, bare: PreTrainedModel, folder: Path) -> Any:
    if isinstance(adapter, RoutedTask):
        adapter = own_factors(inventory, adapter.weights)
    assert isinstance(adapter, PrivateAdapter)
    folder.mkdir()
    for name, data in peft_folder(adapter, "tiny").items():
        (folder / name).write_bytes(data)
    return PeftModel.from_pretrained(copy.deepcopy(bare), folder).eval()


def greedy(answer: Any, ids: Tensor) -> Tensor:
    for _ in range(8):
        ids = torch.cat([ids, answer(ids)[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_logits_and_greedy_tokens_equal_those_served(
    family: str, form: str, tmp_path: Path
) -> None:
    bare = tiny_model(family)
    inventory = tiny_inventory(bare)
    served = [random_task(inventory, "t", 0), signed_task(inventory, 1), uneven(inventory, 3)]
    models = [in_peft(a, inventory, bare, tmp_path / str(i)) for i, a in enumerate(served)]
    injection = inject(bare, inventory, FORMS[form])
    ids = torch.randint(1, 250, (3, 7), generator=torch.Generator().manual_seed(3))

    def here(tokens: Tensor) -> Tensor:
        with use_plan(injection.plan(served, [tokens.shape[1]] * 3)):
            logits: Tensor = bare(input_ids=tokens, use_cache=False).logits
        return logits

    def there(tokens: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        rows = [models[m](input_ids=tokens[i : i + 1]).logits for i, m in enumerate(order)]
        return torch.cat(rows)

    assert (there(ids) - here(ids)).abs().max() < EXACT
    assert (there(ids, (1, 2, 0)) - here(ids)).abs().amax((1, 2)).min() > DIFFERENT
    found, wanted = greedy(there, ids), greedy(here, ids)
    assert torch.equal(found, wanted)
    turned = greedy(lambda tokens: there(tokens, (1, 2, 0)), ids)
    assert (turned != wanted).any(1).all()


def test_a_folder_comes_back_as_the_adapter_that_it_was_made_of() -> None:
    inventory = tiny_inventory(tiny_model())
    adapter = uneven(inventory, 1)
    files = peft_folder(adapter, "tiny")
    again = read_peft_lora(files[CONFIG_FILE], files[WEIGHTS_FILE], inventory.header.modules)
    assert again.fingerprint == adapter.fingerprint != uneven(inventory, 2).fingerprint
