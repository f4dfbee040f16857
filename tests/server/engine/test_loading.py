"""What loading refuses, before a request could meet it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import save_backbone, tiny_inventory, tiny_model, tiny_t5
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

from polyhead.server.config import Settings
from polyhead.server.engine.backbone import find_backbone, load_backbone
from polyhead.server.engine.errors import BackboneError
from polyhead.server.engine.loading import Loaded, load


def loaded(model: PreTrainedModel, folder: Path) -> Loaded:
    backbone = save_backbone(model, folder / "backbone")
    tiny_inventory(model).save(folder / "inventory")
    settings = Settings(
        backbone=str(backbone),
        inventory=folder / "inventory",
        data_dir=folder / "data",
        dtype="float32",
        kv_cache_tokens=1024,
    )
    return load(settings)


def test_a_sound_backbone_gives_an_engine(tmp_path: Path) -> None:
    engine = loaded(tiny_model(), tmp_path).engine(lambda _events: None)
    assert engine.stats().kv_capacity_tokens == 1024


def test_soft_capped_attention_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=0,
    )
    parts = loaded(Gemma2ForCausalLM(config).eval(), tmp_path)
    with pytest.raises(BackboneError, match="softcap"):
        parts.engine(lambda _events: None)


def test_rotary_embeddings_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope)
    with pytest.raises(BackboneError, match="dynamic"):
        loaded(model, tmp_path)


def test_an_encoder_decoder_gives_an_engine_too(tmp_path: Path) -> None:
    parts = loaded(tiny_t5(), tmp_path)
    assert parts.tokenizer.decoder_start == 0
    assert parts.max_context == 1024
    assert parts.engine(lambda _events: None).stats().kv_capacity_tokens == 1024


def test_an_encoder_decoder_in_float16_is_refused(tmp_path: Path) -> None:
    """transformers keeps a part of it in float32 there, for it would overflow."""
    save_backbone(tiny_t5(), tmp_path)
    with pytest.raises(BackboneError, match="t5 overflows in float16; expected bfloat16"):
        load_backbone(tmp_path, torch.float16, torch.device("cpu"))


def test_another_encoder_decoder_is_refused_in_a_line_and_read_where_it_is_converted(
    tmp_path: Path,
) -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_layers=1, decoder_layers=1)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="bart is an encoder-decoder that is not served"):
        load_backbone(tmp_path, torch.float32, torch.device("cpu"))
    model = load_backbone(tmp_path, torch.float32, torch.device("cpu"), any_kind=True)
    assert isinstance(model, BartForConditionalGeneration)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    settings = Settings(backbone=str(tmp_path), inventory=tmp_path, data_dir=tmp_path)
    with pytest.raises(BackboneError, match=r"config\.json"):
        load(settings)


def test_a_named_backbone_comes_from_the_local_cache(tmp_path: Path) -> None:
    commit = "a" * 40
    cached = tmp_path / "hub" / "models--polyhead--tiny"
    save_backbone(tiny_model(), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = (
        "from polyhead.server.engine.backbone import find_backbone\n"
        "print(find_backbone('polyhead/tiny'))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == cached / "snapshots" / commit


@pytest.mark.parametrize("name", ["polyhead/no-such-model", "../x/../y", "a b"])
def test_a_backbone_that_is_nowhere_is_refused_by_name(name: str) -> None:
    with pytest.raises(BackboneError, match="neither a folder nor a model"):
        find_backbone(name)
