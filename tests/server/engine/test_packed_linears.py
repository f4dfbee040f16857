"""Reordered weights give the same bits, and layers that cannot have them are left alone."""

import pytest
import torch
from factories import random_task, tiny_inventory, tiny_model
from torch import nn

from polyhead.adapters.inject import inject
from polyhead.adapters.plan import use_plan
from polyhead.server.engine import packed_linears
from polyhead.server.engine.packed_linears import pack_linears

TAKEN = packed_linears._supported()


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_the_answer_is_the_same_bit_for_bit(family: str, tokens: int) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    ids = torch.arange(3, 3 + tokens)[None] % 200
    before = model(ids).logits
    layers = sum(type(layer) is nn.Linear for layer in model.modules())
    assert pack_linears(model) == (layers if TAKEN else 0)
    assert torch.equal(model(ids).logits, before)
    model.lm_head.weight.data[5] = 0  # control: the copies are what is read
    assert torch.equal(model(ids).logits, before) == TAKEN


@torch.inference_mode()
def test_adapters_are_added_to_what_it_computes() -> None:
    ids = torch.arange(3, 15)[None]
    logits = {}
    for packed in (False, True):
        model = tiny_model().to(torch.bfloat16)
        if packed:
            pack_linears(model)
        inventory = tiny_inventory(model)
        injection = inject(model, inventory)
        bare = model(ids).logits
        with use_plan(injection.plan([random_task(inventory, "t", 1)], [12])):
            logits[packed] = model(ids).logits
        assert not torch.equal(bare, logits[packed])
    assert torch.equal(logits[False], logits[True])


def test_gradients_and_other_types_go_the_ordinary_way() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    assert pack_linears(model) == int(TAKEN)  # type: ignore[arg-type]
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer.weight.sum(0).expand(3, 8))
    assert pack_linears(nn.Sequential(nn.Linear(8, 4))) == 0  # type: ignore[arg-type]
