"""PEFT's own models are the oracle: a folder that PEFT wrote must answer as it does there."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_inventory, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inject import inject
from polyhead.adapters.peft_lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_peft_lora
from polyhead.adapters.plan import use_plan
from polyhead.adapters.private import PrivateAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

EXACT = 1e-5
DIFFERENT = 1e-2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_LAYER = r"model\.layers\.1\.self_attn\.q_proj"

CASES: dict[str, tuple[str, list[str] | str, dict[str, Any]]] = {
    "plain": ("llama", "all-linear", {"r": 4, "lora_alpha": 8}),
    "rank one": ("llama", ["q_proj", "down_proj"], {"r": 1, "lora_alpha": 3}),
    "rsLoRA": ("qwen2", ATTENTION, {"r": 9, "lora_alpha": 2, "use_rslora": True}),
    "patterns": (
        "llama",
        [*ATTENTION, "up_proj"],
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 7, "layers.0.mlp.up_proj": 2},
            "alpha_pattern": {"v_proj": 1, "o_proj": 24, LLAMA_LAYER: 5},
        },
    ),
    "patterns that are expressions, with rsLoRA": (
        "qwen2",
        ATTENTION,
        {
            "r": 3,
            "lora_alpha": 4,
            "use_rslora": True,
            "rank_pattern": {r"model\.layers\.[1-9]\.\w+\.[vo]_proj": 6, "(q|k)_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, ".*[vo]_proj": 2, "v_proj": 1},
        },
    ),
    "Conv1D": ("gpt2", ["c_attn", "c_proj"], {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
    "Conv1D, not said": ("gpt2", ["c_attn", "c_fc"], {"r": 3, "rank_pattern": {"c_fc": 5}}),
}


def adapted(
    bare: PreTrainedModel, seed: int, targets: list[str] | str, **options: Any
) -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)
    wrapped = get_peft_model(copy.deepcopy(bare), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return wrapped.eval()


def written(wrapped: PeftModel, folder: Path) -> tuple[bytes, bytes]:
    wrapped.save_pretrained(folder)
    return (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_equals_pefts_models(case: str, tmp_path: Path) -> None:
    family, targets, options = CASES[case]
    bare = tiny_model(family)
    inventory = tiny_inventory(bare)
    ids = torch.randint(1, 250, (2, 7), generator=torch.Generator().manual_seed(3))
    folders = [tmp_path / "0", tmp_path / "1"]
    files = [
        written(adapted(bare, seed, targets, **options), folder)
        for seed, folder in enumerate(folders)
    ]
    # As anyone else reads the folder: PEFT sorts the patterns when it writes them.
    models = [PeftModel.from_pretrained(copy.deepcopy(bare), folder).eval() for folder in folders]
    wanted = torch.cat([m(input_ids=ids[i : i + 1]).logits for i, m in enumerate(models)])
    read = [read_peft_lora(*pair, inventory.header.modules) for pair in files]
    injection = inject(bare, inventory)

    def answers(adapters: list[PrivateAdapter]) -> Tensor:
        with use_plan(injection.plan(adapters, [7, 7])):
            logits: Tensor = bare(input_ids=ids).logits
        return logits

    assert (answers(read) - wanted).abs().max() < EXACT
    assert (answers(read[::-1]) - wanted).abs().amax((1, 2)).min() > DIFFERENT


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    wrapped = adapted(tiny_model(), 1, ["q_proj", "down_proj"], r=3, lora_alpha=6)
    return written(wrapped, tmp_path_factory.mktemp("lora"))


MODULES = tiny_inventory(tiny_model()).header.modules
Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(config: bytes, weights: bytes, **options: Any) -> PrivateAdapterError:
    with pytest.raises(PrivateAdapterError) as caught:
        read_peft_lora(config, weights, MODULES, **options)
    return caught.value


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.w"]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [3, 4]},
        {"megatron_config": {"a": 1}},
        {"loftq_config": {"bits": 4}},
        {"some_later_option": 1},
        {"peft_type": "ADALORA"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": 1.5},
        {"r": 0},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
    ],
)
def test_options_that_are_not_implemented_are_refused_by_name(
    saved: tuple[bytes, bytes], change: dict[str, Any]
) -> None:
    config = json.dumps(json.loads(saved[0]) | change).encode()
    error = refused(config, saved[1])
    assert error.field == f"adapter_config.{next(iter(change))}"


@pytest.mark.parametrize("name", ["r", "lora_alpha", "peft_type"])
def test_options_that_are_missing_are_named(saved: tuple[bytes, bytes], name: str) -> None:
    config = json.loads(saved[0])
    del config[name]
    assert refused(json.dumps(config).encode(), saved[1]).field == f"adapter_config.{name}"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (b"", "adapter_config.json"),
        (b"[]", "adapter_config.json"),
        (b"\xff", "adapter_config.json"),
        (b"[" * 100_000, "adapter_config.json"),
    ],
)
def test_a_configuration_that_is_none_is_refused(
    saved: tuple[bytes, bytes], config: bytes, field: str
) -> None:
    assert refused(config, saved[1]).field == field


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda t: t.update({PREFIX + Q_PROJ + ".lora_magnitude_vector": torch.ones(3)}), "vector"),
        (lambda t: t.update({PREFIX + "lm_head.weight": torch.ones(3)}), "lm_head.weight"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(3, 64)}), "x.lora_A.weight"),
        (lambda t: t.pop(f"{PREFIX}{Q_PROJ}.lora_B.weight"), "private_adapter"),
        (lambda t: t.update({f"{PREFIX}{Q_PROJ}.lora_A.weight": torch.ones(4, 64)}), "lora_A"),
        (lambda t: t.update({f"{PREFIX}{Q_PROJ}.lora_A.weight": torch.ones(3, 63)}), Q_PROJ),
        (lambda t: t.update({f"{PREFIX}{Q_PROJ}.lora_B.weight": torch.ones(64)}), "lora_B"),
        (lambda t: t[f"{PREFIX}{Q_PROJ}.lora_B.weight"].fill_(torch.nan), Q_PROJ),
        (lambda t: t.clear(), "private_adapter"),
    ],
)
def test_tensors_at_odds_with_the_configuration_are_refused(
    saved: tuple[bytes, bytes], edit: Callable[[dict[str, Tensor]], object], field: str
) -> None:
    tensors = load(saved[1])
    edit(tensors)
    assert field in refused(saved[0], save(tensors)).field


def test_no_safetensors_and_a_rank_over_the_limit_are_refused(saved: tuple[bytes, bytes]) -> None:
    assert refused(saved[0], b"\x80\x04pickle").field == WEIGHTS_FILE
    assert "1 <= r <= 2" in refused(*saved, max_rank=2).expected
    read_peft_lora(*saved, MODULES, max_rank=3)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular"),
        ("a" * 513, "too long"),
        ("(?:(?:.|..|...)+.*.*.*){e<9}(?:\\b\\B)", "too long to"),
    ],
)
def test_hostile_patterns_are_refused_in_time(
    saved: tuple[bytes, bytes], pattern: str, message: str
) -> None:
    config = json.dumps(json.loads(saved[0]) | {"alpha_pattern": {pattern: 1.0}}).encode()
    started = time.monotonic()
    error = refused(config, saved[1])
    assert message in error.message
    assert error.field == "adapter_config.alpha_pattern"
    assert time.monotonic() - started < 5
