"""mttl's formulas, written out here from its code's definitions, are the oracle."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from polyhead.adapters.convert.mttl import convert_mttl
from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inventory import Inventory

TASKS, SKILLS, HEADS, RANK, WIDTH = 3, 4, 2, 2, 16
EXACT, DIFFERENT = 1e-6, 1e-2
T5_LAYERS = [
    f"{stack}.block.{block}.layer.{layer}.{part}"
    for stack, layers in (
        ("encoder", ["0.SelfAttention.q", "0.SelfAttention.v", "1.DenseReluDense.wi"]),
        ("decoder", ["0.SelfAttention.q", "1.EncDecAttention.v", "2.DenseReluDense.wo"]),
    )
    for block in range(2)
    for layer, part in (each.split(".", 1) for each in layers)
]


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 32, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=2)).eval()


def drawn(generator: torch.Generator, *shape: int, std: float = 0.5) -> Tensor:
    return torch.randn(*shape, generator=generator) * std


def group_by_hand(layer: str, granularity: str) -> str:
    parts = layer.split(".")
    kept = {"finegrained": 99, "coarsegrained": 0, "coderwise": 2, "blockwise": 3, "layerwise": 5}
    return ".".join(parts[: kept[granularity]])


def camera_ready(
    model: PreTrainedModel, folder: Path, granularity: str, **options: Any
) -> dict[str, Tensor]:
    """Write a checkpoint as the camera-ready code does; give all its layers' tensors."""
    generator = torch.Generator().manual_seed(5)
    whole, saved, selectors = {}, {}, {}
    for layer in T5_LAYERS:
        linear: Any = model.get_submodule(layer)
        sizes = (linear.in_features // HEADS, linear.out_features // HEADS)
        whole[f"model.{layer}.lora_a"] = drawn(generator, HEADS, SKILLS, sizes[0], RANK)
        whole[f"model.{layer}.lora_b"] = drawn(generator, HEADS, SKILLS, RANK, sizes[1])
        key, group = f"model.{layer}.selector.module_logits", group_by_hand(layer, granularity)
        if group not in selectors:  # parameters are saved under their first name only
            selectors[group] = saved[key] = drawn(generator, TASKS, HEADS * SKILLS, std=3.0)
        whole[key] = selectors[group]
    saved |= {key: tensor for key, tensor in whole.items() if not key.endswith("logits")}
    config = {"router_granularity": granularity, "model": "t5", "model_modifier": "poly", **options}
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": saved, "hyper_parameters": config, "epoch": 1}, folder / "best.ckpt")
    return whole


def camera_ready_delta(whole: dict[str, Tensor], layer: str, task: int, x: Tensor) -> Tensor:
    """What the layer adds, from the definition: sigmoid, normalise, combine, B's heads turned."""
    logits = whole[f"model.{layer}.selector.module_logits"][task].view(HEADS, SKILLS)
    weights = torch.sigmoid(logits)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
    a = torch.einsum("hs,hsdr->hdr", weights, whole[f"model.{layer}.lora_a"]).reshape(-1, RANK)
    b = torch.einsum("hs,hsrd->hrd", weights, whole[f"model.{layer}.lora_b"])
    return x @ a @ b.transpose(0, 1).reshape(RANK, -1) / RANK


def served_delta(inventory: Inventory, layer: str, task: str, x: Tensor) -> Tensor:
    """`scaling * (x A_t) B_t`, head by head."""
    index = inventory.layout.modules.index(layer)
    w = inventory.tasks[task].weights(inventory.layout)[index]
    heads = range(inventory.header.heads)
    a = torch.cat([torch.tensordot(w[h], inventory.a[layer][h], 1) for h in heads], 0)
    b = torch.cat([torch.tensordot(w[h], inventory.b[layer][h], 1) for h in heads], 1)
    return inventory.header.scaling * (x @ a @ b)


def inputs(model: PreTrainedModel, layer: str) -> Tensor:
    linear: Any = model.get_submodule(layer)
    return torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("granularity", "ours"),
    [
        ("finegrained", "module"),
        ("layerwise", "module"),
        ("blockwise", "block"),
        ("coderwise", "module"),
        ("coarsegrained", "model"),
    ],
)
def test_the_camera_ready_formula_is_kept(tmp_path: Path, granularity: str, ours: str) -> None:
    model = t5()
    whole = camera_ready(model, tmp_path, granularity)
    inventory = convert_mttl(tmp_path, model, "t5", ["a", "b", "c"])
    assert {task.granularity for task in inventory.tasks.values()} == {ours}
    assert set(inventory.layout.modules) == set(T5_LAYERS)
    for layer in T5_LAYERS:
        x = inputs(model, layer)
        for index, name in enumerate("abc"):
            wanted = camera_ready_delta(whole, layer, index, x)
            assert (served_delta(inventory, layer, name, x) - wanted).abs().max() < EXACT * 10
            other = served_delta(inventory, layer, "bca"[index], x)
            assert (other - wanted).abs().max() > DIFFERENT


def test_forgetting_to_turn_the_heads_of_b_would_show(tmp_path: Path) -> None:
    model = t5()
    whole = camera_ready(model, tmp_path, "finegrained")
    layer, x = T5_LAYERS[0], inputs(model, T5_LAYERS[0])
    whole[f"model.{layer}.lora_b"] = (
        whole[f"model.{layer}.lora_b"].transpose(0, 2).contiguous().view(HEADS, SKILLS, RANK, -1)
    )
    inventory = convert_mttl(tmp_path, model, "t5")
    found = served_delta(inventory, layer, "task-0", x)
    assert (found - camera_ready_delta(whole, layer, 0, x)).abs().max() > DIFFERENT


def test_options_beside_the_checkpoint_and_another_alpha(tmp_path: Path) -> None:
    model = t5()
    whole = camera_ready(model, tmp_path, "finegrained")
    tensors = torch.load(tmp_path / "best.ckpt")["state_dict"]
    torch.save(tensors, tmp_path / "best.ckpt")
    (tmp_path / "config.json").write_text(json.dumps({"lora_alpha": 8.0}))
    inventory = convert_mttl(tmp_path / "best.ckpt", model, "t5")
    layer, x = T5_LAYERS[3], inputs(model, T5_LAYERS[3])
    wanted = 8 * camera_ready_delta(whole, layer, 1, x)
    assert (served_delta(inventory, layer, "task-1", x) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("module_logits_straight_through", True),
        ("module_logits_l2_norm", True),
        ("module_logits_dropout", 0.1),
        ("poly_use_shared_skill", True),
        ("poly_average_correction", True),
        ("lora_warmup", True),
        ("uniform_interp_steps", 100),
        ("switch_to_avg_modules", True),
        ("merge_after_op", True),
        ("model_modifier", "skilled"),
        ("router_selector", "private"),
        ("adapter_type", "ia3"),
        ("router_granularity", "headwise"),
        ("lora_alpha", 0),
    ],
)
def test_refused_options_are_named(tmp_path: Path, option: str, value: object) -> None:
    model = t5()
    camera_ready(model, tmp_path, "finegrained")
    whole = torch.load(tmp_path / "best.ckpt")
    convert_mttl(tmp_path, model, "t5")
    whole["hyper_parameters"][option] = value
    torch.save(whole, tmp_path / "best.ckpt")
    with pytest.raises(ConversionError, match=rf"config\.{option}.*{value!r}"):
        convert_mttl(tmp_path, model, "t5")


def test_broken_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    model = t5()
    camera_ready(model, tmp_path, "blockwise")
    good = torch.load(tmp_path / "best.ckpt")

    def refused(match: str, backbone: PreTrainedModel = model, **tensors: Tensor | None) -> None:
        changed = copy.copy(good)
        state = good["state_dict"] | {f"model.{name}": t for name, t in tensors.items()}
        changed["state_dict"] = {name: t for name, t in state.items() if t is not None}
        torch.save(changed, tmp_path / "best.ckpt")
        with pytest.raises(ConversionError, match=match):
            convert_mttl(tmp_path, backbone, "t5")

    first = T5_LAYERS[0]
    logits = f"{first}.selector.module_logits"
    refused("no layer of its group has logits", **{logits: None})
    second = logits.replace(".q.", ".v.")
    refused("share a selector have different logits", **{second: torch.zeros(3, 8)})
    refused("A or B is missing", **{f"{first}.lora_b": None})
    refused("none of the adapters'", **{"shared.weight": torch.zeros(2)})
    refused("wrong shape of the logits", **{logits: torch.zeros(3, 7)})
    refused("the backbone has no such module", tiny_model())
    (tmp_path / "second.ckpt").touch()
    with pytest.raises(ConversionError, match="or several"):
        convert_mttl(tmp_path, model, "t5")


MAIN_LAYERS = [
    f"model.layers.{index}.{layer}"
    for index in range(2)
    for layer in ("self_attn.q_proj", "mlp.up_proj")
]


def write_main(folder: Path, model: PreTrainedModel, granularity: str, **selector: Any) -> Any:
    """As the main branch saves a multi-expert model; views of a selector hold no logits."""
    generator = torch.Generator().manual_seed(6)
    whole, saved, selectors = {}, {}, {}
    for layer in MAIN_LAYERS:
        linear: Any = model.get_submodule(layer)
        sizes = (linear.in_features // HEADS, linear.out_features // HEADS)
        saved[f"model.{layer}.experts.lora_a"] = drawn(generator, SKILLS, HEADS, sizes[0], RANK)
        saved[f"model.{layer}.experts.lora_b"] = drawn(generator, SKILLS, RANK, HEADS, sizes[1])
        group = {"*": layer, "coarsegrained": "", "mlp": layer.split("mlp")[0]}[granularity]
        if group not in selectors:
            rows = drawn(generator, TASKS + 1, HEADS * SKILLS, std=3.0)
            selectors[group] = saved[f"model.{layer}.selector.module_logits"] = rows
        whole[layer] = selectors[group]
    expert = {"class_name": "mttl.models.modifiers.lora.SkilledLoRAConfig", "lora_alpha": 4.0}
    poly = "mttl.models.containers.selectors.poly_selector.PolySelectorConfig"
    config = {
        "base_model": "tiny",
        "expert_infos": [{"expert_name": f"e{i}", "expert_config": expert} for i in range(SKILLS)],
        "selector_config": {
            "class_name": poly,
            "router_granularity": granularity,
            "task_names": ["first", "second", "third"],
            **selector,
        },
    }
    torch.save(saved, folder / "mttl_weights.bin")
    (folder / "mttl_config.json").write_text(json.dumps(config))
    return saved, whole, config


@pytest.mark.parametrize(("granularity", "ours"), [("*", "module"), ("coarsegrained", "model")])
def test_the_main_formula_is_kept(tmp_path: Path, granularity: str, ours: str) -> None:
    model = tiny_model()
    saved, whole, _ = write_main(tmp_path, model, granularity)
    inventory = convert_mttl(tmp_path, model, "tiny")
    assert list(inventory.tasks) == ["first", "second", "third"]
    assert inventory.tasks["first"].granularity == ours
    for layer in MAIN_LAYERS:
        x = inputs(model, layer)
        for index, name in enumerate(inventory.tasks):
            s = torch.sigmoid(whole[layer][index].view(HEADS, SKILLS))
            w = s / (s.sum(-1, keepdim=True) + 1e-8)
            a = torch.einsum("qs,sqdr->qdr", w, saved[f"model.{layer}.experts.lora_a"])
            b = torch.einsum("qs,srqd->rqd", w, saved[f"model.{layer}.experts.lora_b"])
            wanted = 4.0 / RANK * (x @ a.reshape(-1, RANK) @ b.reshape(RANK, -1))
            found = served_delta(inventory, layer, name, x)
            assert (found - wanted).abs().max() < 1e-4
            other = served_delta(inventory, layer, list(inventory.tasks)[index - 1], x)
            assert (other - wanted).abs().max() > DIFFERENT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_merge_after": True}, "lora_merge_after"),
        ({"class_name": "x.PolySelectorDirectConfig"}, "PolySelectorDirectConfig"),
        ({"class_name": "x.ArrowSelectorConfig"}, "ArrowSelectorConfig"),
        ({"router_granularity": "block.7"}, "router_granularity"),
        ({"task_names": ["only"]}, "rows of logits"),
    ],
)
def test_refused_options_of_main_are_named(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    model = tiny_model()
    _, _, config = write_main(tmp_path, model, "*")
    config["selector_config"] |= change
    (tmp_path / "mttl_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=match):
        convert_mttl(tmp_path, model, "tiny")


@pytest.mark.parametrize(
    ("expert", "match"),
    [
        ({"class_name": "x.LoRAConfig", "lora_alpha": 5.0}, "different alphas"),
        ({"class_name": "x.IA3Config"}, "IA3Config"),
    ],
)
def test_odd_experts_of_main_are_named(tmp_path: Path, expert: Any, match: str) -> None:
    model = tiny_model()
    _, _, config = write_main(tmp_path, model, "*")
    config["expert_infos"][2]["expert_config"] = expert
    (tmp_path / "mttl_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=match):
        convert_mttl(tmp_path, model, "tiny")
