"""Quantised backbones: adapters are added exactly, the rest is left alone, and what cannot be is
refused by name."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    Collector,
    random_private,
    random_task,
    save_backbone,
    tiny_inventory,
    tiny_model,
    tiny_t5,
)
from oracles import deltas, distance
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.layers import RoutedLinear
from polyhead.adapters.plan import Adapter, use_plan
from polyhead.server.config import Settings
from polyhead.server.engine.errors import BackboneError
from polyhead.server.engine.loading import Loaded, load
from polyhead.server.engine.packed_linears import pack_linears
from polyhead.server.engine.quantized import check_quantize, quantize_linears
from polyhead.server.engine.request import Request, SamplingParams

BITS = ["int8", "int4"]


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: the extra `quantize`")


def a_request(name: str, adapter: Adapter) -> Request:
    ids = tuple((ord(name[0]) + 7 * i) % 256 for i in range(9))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return Request(name, name, name, ids, adapter, params)


class Plain(nn.Module):
    """`base(x) + x delta`, and nothing of ours."""

    def __init__(self, base: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.base, self.delta, self.weight = base, delta, base.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + x @ self.delta
        return found


@torch.inference_mode()
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("wanted", BITS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str
)
def test_a_mixed_batch_is_the_quantised_layer_plus_each_rows_delta(
    wanted: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model().to(dtype)
    inventory = tiny_inventory(model)
    linears = [model.get_submodule(name) for name in inventory.layout.modules]
    weights = [layer.weight for layer in linears]
    assert quantize_linears(model, wanted) == len(linears)
    injection = inject(model, inventory)
    tasks = [random_task(inventory, "a", 1), random_task(inventory, "b", 2)]
    adapters: list[Adapter] = [*tasks, None, random_private(inventory, 3)]
    counts, added = [3, 1, 2, 4], [deltas(inventory, adapter) for adapter in adapters]
    plan = injection.plan([*tasks, None, injection.planner.prepare(adapters[3])], counts)
    for name, weight in zip(inventory.layout.modules, weights, strict=True):
        layer = model.get_submodule(name)
        x = torch.randn(1, sum(counts), weight.shape[1], dtype=dtype)
        with use_plan(plan):
            rows = list(layer(x).split(counts, 1))
        bare = layer.base(x).split(counts, 1)
        parts = x.split(counts, 1)
        right = [by_hand(*parts) for parts in zip(bare, parts, added, [name] * 4, strict=True)]
        assert distance(torch.cat(rows, 1), torch.cat(right, 1)) < tolerance
        wrong = [by_hand(bare[0], parts[0], added[1], name)]  # control: another task's
        assert distance(rows[0], wrong[0]) > 0.1
        exact = nn.functional.linear(x, weight)  # control: the layer does hold fewer bits
        assert 0.001 < distance(layer.base(x), exact) < 0.2


def by_hand(bare: Tensor, x: Tensor, added: dict[str, Tensor], name: str) -> Tensor:
    delta = added.get(name)
    return bare.double() if delta is None else bare.double() + x.double() @ delta


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Loaded:
    model = tiny_model()
    tiny_inventory(model).save(tmp_path / "inventory")
    return load(settings(save_backbone(model, tmp_path / "backbone"), request.param))


def settings(backbone: Path, wanted: str, **more: Any) -> Settings:
    folders = {"inventory": backbone.parent / "inventory", "data_dir": backbone.parent / "data"}
    sizes = {"dtype": "float32", "kv_cache_tokens": 1024}
    return Settings(backbone=str(backbone), quantize=wanted, **{**folders, **sizes, **more})  # type: ignore[arg-type]


@torch.inference_mode()
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("served", BITS, indirect=True)
def test_a_servers_mixed_answers_are_each_tasks_own(served: Loaded) -> None:
    """The inventory is that of the unquantised backbone: its fingerprint still fits."""
    inventory = served.inventory
    tasks = {name: random_task(inventory, name, seed) for seed, name in enumerate("ab")}
    asked = {name: a_request(name, task) for name, task in tasks.items()}
    asked["c"] = a_request("c", None)
    collector = Collector()
    engine = served.engine(collector.publish)
    engine.start()
    for request in asked.values():
        engine.submit(request)
    answers = {name: collector.tokens(request) for name, request in asked.items()}
    engine.stop()
    served.injection.remove()
    assert {name: greedy(served.model, asked[name], inventory) for name in asked} == answers
    swapped = greedy(served.model, asked["a"], inventory, tasks["b"])  # control: another task
    assert swapped != answers["a"]


def greedy(
    model: PreTrainedModel, request: Request, inventory: Inventory, adapter: Adapter = None
) -> list[int]:
    """What plain torch answers with each layer's `base(x) + x delta`."""
    added = deltas(inventory, adapter or request.adapter)
    bases = {name: model.get_submodule(name) for name in added}
    for name, base in bases.items():
        model.set_submodule(name, Plain(base, added[name].float()))
    ids = list(request.prompt)
    for _ in range(request.params.max_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    for name, base in bases.items():
        model.set_submodule(name, base)
    return ids[len(request.prompt) :]


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("wanted", BITS)
def test_head_and_embeddings_stay_and_only_they_are_packed(wanted: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    assert pack_linears(tiny_model().to(torch.bfloat16)) in (0, 15)
    count = quantize_linears(model, wanted)
    plain = {n for n, p in model.named_parameters() if type(p) is nn.Parameter and p.dim() > 1}
    assert plain == {"lm_head.weight", "model.embed_tokens.weight"}
    assert count == 14
    assert pack_linears(model) in (0, 1)  # 0 where oneDNN does not take bfloat16
    assert model(torch.arange(9)[None]).logits.dtype == torch.bfloat16


@pytest.mark.usefixtures("torchao")
def test_an_encoder_decoder_can_be_quantised() -> None:
    model = tiny_t5()
    asked = {"input_ids": torch.arange(2, 9)[None], "decoder_input_ids": torch.arange(3)[None]}
    before = model(**asked).logits
    assert quantize_linears(model, "int8") > 0
    injection = inject(model, inventory := tiny_inventory(tiny_t5()))
    assert 0.0001 < distance(model(**asked).logits, before) < 0.2
    assert sum(isinstance(m, RoutedLinear) for m in model.modules()) == injection.count
    assert inventory.header.backbone == BackboneRef.of(tiny_t5(), "tiny")


@pytest.mark.usefixtures("torchao")
def test_layers_of_odd_width_stay_as_they_are_in_int4() -> None:
    model = tiny_model(intermediate_size=72)  # no group of 32 divides the input of `down_proj`
    assert quantize_linears(model, "int4") == 8  # nor 16 the outputs of `gate_proj`, `up_proj`
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


@pytest.mark.usefixtures("torchao")
def test_a_backbone_without_a_layer_that_fits_is_refused() -> None:
    with pytest.raises(BackboneError, match="int8: none of 0 layers of gpt2 can be; expected"):
        quantize_linears(tiny_model("gpt2"), "int8")
    with pytest.raises(BackboneError, match="int8 on meta: expected --device cpu or cuda"):
        quantize_linears(tiny_model().to("meta"), "int8")  # type: ignore[arg-type]


def test_without_torchao_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    wanted = r"--quantize int8 needs torchao \(.*\): pip install 'polyhead\[quantize\]'"
    with pytest.raises(BackboneError, match=wanted):
        load(settings(tmp_path / "none", "int8"))


def test_a_cut_backbone_is_refused_before_processes_start() -> None:
    with pytest.raises(BackboneError, match=r"int4 with --tensor-parallel 2: .* expected --tensor"):
        check_quantize("int4", 2)
