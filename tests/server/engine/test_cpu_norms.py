"""Compiled norms against the layers they take the place of, and layers that are left alone."""

import math

import pytest
import torch
from factories import tiny_model
from torch import Tensor, nn

from polyhead.adapters.cpu_pair_tiles import pairs_supported
from polyhead.server.engine.cpu_norms import compile_norms

needs_bfloat16 = pytest.mark.skipif(not pairs_supported(), reason="the CPU has no bfloat16")
IDS = torch.arange(3, 40)[None]


class Scaled(nn.Module):
    """Looks like transformers' norm; `shift` makes it Gemma's, which is another one."""

    def __init__(self, width: int, shift: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.weight = nn.Parameter(torch.randn(width, generator=generator))
        self.variance_epsilon = 1e-5
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.shift + self.weight) * scaled.to(x.dtype)


class Holder(nn.Sequential):
    """As much of a backbone as is looked at."""

    dtype, device = torch.bfloat16, torch.device("cpu")


def held(layer: nn.Module) -> Holder:
    return Holder(layer.to(torch.bfloat16))


@needs_bfloat16
@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 7, 64, 576, 1000])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e4])
def test_a_norm_is_the_layers_to_a_neighbouring_number(width: int, spread: float) -> None:
    model = held(Scaled(width))
    x = spread * torch.randn(3, 11, width, generator=torch.Generator().manual_seed(1))
    x = x.to(torch.bfloat16)
    wanted = model(x)
    assert compile_norms(model) == 1  # type: ignore[arg-type]
    found = model(x)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2.0**-7, atol=0)
    assert (found != wanted).float().mean() < 0.01
    model[0].weight.mul_(-1)  # control: the weight is read anew, and matters
    assert torch.equal(model(x), -found)


@needs_bfloat16
@torch.inference_mode()
def test_what_is_not_a_number_stays_so() -> None:
    model = held(Scaled(64))
    compile_norms(model)  # type: ignore[arg-type]
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 5] = math.nan, math.inf
    found = model(x)
    assert found[0].isnan().all()
    assert found[1, 5].isnan()
    assert found[2].isfinite().all()


@needs_bfloat16
def test_other_norms_and_other_numbers_are_left_alone() -> None:
    model = held(Scaled(64, shift=1.0))
    assert compile_norms(model) == 0  # type: ignore[arg-type]
    assert compile_norms(tiny_model()) == 0, "float32"
    model = held(Scaled(64))
    assert compile_norms(model) == 1  # type: ignore[arg-type]
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    model(x).float().sum().backward()
    assert x.grad is not None, "gradients still flow"
    assert x.grad.abs().sum() > 0
    wide = torch.randn(2, 64)
    assert torch.equal(model(wide), Scaled.forward(model[0], wide))


@needs_bfloat16
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_backbone_answers_the_same(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    norms = sum(hasattr(layer, "variance_epsilon") for layer in model.modules())
    before = model(IDS).logits
    assert compile_norms(model) == norms > 0
    after = model(IDS).logits
    assert (after.argmax(-1) == before.argmax(-1)).float().mean() > 0.9
    model.model.norm.weight.data[3] += 8  # control
    assert (model(IDS).logits - after).abs().max() > 0.05
