"""Reordered weights give the same bits, and layers that cannot have them are left alone."""

import subprocess
import sys

import pytest
import torch
from factories import random_task, tiny_inventory, tiny_model
from torch import nn

from polyhead.adapters.inject import inject
from polyhead.adapters.plan import use_plan
from polyhead.adapters.sharding import Cut, Ranks, ShardedLinear
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


@torch.inference_mode()
@pytest.mark.parametrize("cut", ["colwise", "rowwise"])
def test_parts_of_layers_are_reordered_too(cut: Cut) -> None:
    layer = ShardedLinear(nn.Linear(64, 32).to(torch.bfloat16), cut, Ranks(0, 2))
    x = torch.randn(1, 21, layer.weight.shape[1], dtype=torch.bfloat16)
    before = layer.part(x)
    assert pack_linears(nn.Sequential(layer)) == int(TAKEN)  # type: ignore[arg-type]
    assert torch.equal(layer.part(x), before)
    layer.weight.zero_()  # control: the copy is what is read
    assert torch.equal(layer.part(x), before) == TAKEN


def test_gradients_and_other_types_go_the_ordinary_way() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    assert pack_linears(model) == int(TAKEN)  # type: ignore[arg-type]
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer.weight.sum(0).expand(3, 8))
    assert pack_linears(nn.Sequential(nn.Linear(8, 4))) == 0  # type: ignore[arg-type]


def test_few_numbers_of_rows_are_computed() -> None:
    """oneDNN keeps code for each."""
    rounded = [packed_linears.rounded_rows(rows) for rows in range(1, 4097)]
    assert rounded[:16] == list(range(1, 17))
    assert all(rows <= more <= rows * 9 / 8 for rows, more in enumerate(rounded, 1))
    assert len(set(rounded)) == 16 + 8 * 8


GROWTH = """
import sys
import torch
from torch import nn
from polyhead.server.engine import packed_linears
from polyhead.server.heap import trim_heap

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

if sys.argv[1] == "every":
    packed_linears.rounded_rows = lambda rows: rows
layer = nn.Linear(256, 256).to(torch.bfloat16).requires_grad_(False)
assert packed_linears.pack_linears(nn.Sequential(layer))
layer(torch.ones(64, 256, dtype=torch.bfloat16))
trim_heap()  # imports leave room in which a few kernels would not show
before = held()
for rows in range(65, 129):
    assert layer(torch.ones(1, rows, 256, dtype=torch.bfloat16)).shape == (1, rows, 256)
print(held() - before)
"""


@pytest.mark.skipif(not TAKEN, reason="oneDNN does not take bfloat16 here")
def test_memory_does_not_grow_with_every_number_of_rows() -> None:
    def grown(rows: str) -> int:
        """Kilobytes, in a process of its own."""
        command = [sys.executable, "-c", GROWTH, rows]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert grown("every") > 16 << 10  # the control
    assert grown("few") < 8 << 10
