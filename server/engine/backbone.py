"""The frozen model: finding it, loading it, and in which numbers it computes."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from polyhead.adapters.encoder_decoder import FAMILIES
from polyhead.server.engine.errors import BackboneError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched of a named backbone: nothing that would have to be unpickled."""


def find_backbone(name: str) -> Path:
    """The folder of a backbone: a path, or a model's name on the Hugging Face hub.

    A named one is taken from the hub's local cache and downloaded into it when it is missing;
    HF_HUB_OFFLINE=1 forbids the download. Raises `BackboneError` when there is neither.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        reason = str(exc).splitlines()[0]
        raise BackboneError(
            f"{name}: neither a folder nor a model that can be had: {reason}"
        ) from exc


def load_backbone(
    folder: Path, dtype: torch.dtype, device: torch.device, *, any_kind: bool = False
) -> PreTrainedModel:
    """A model from a transformers folder, frozen and in evaluation mode.

    any_kind: any encoder-decoder too, for which inventories are converted; else only those are
    taken that are served. Raises `BackboneError`.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(
            f"{folder}: no config.json; expected the folder of a transformers model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.is_encoder_decoder and not (any_kind or config.model_type in FAMILIES):
            raise BackboneError(
                f"{folder}: {config.model_type} is an encoder-decoder that is not served; "
                f"expected {' or '.join(FAMILIES)}, or a causal model"
            )
        if config.is_encoder_decoder and dtype == torch.float16 and not any_kind:
            raise BackboneError(
                f"{folder}: {config.model_type} overflows in float16; expected bfloat16 or float32"
            )
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as exc:
        raise BackboneError(f"{folder}: {exc}") from exc
    model: PreTrainedModel = loaded.to(device).eval().requires_grad_(False)
    _refuse_shared_rope(folder, model)
    return model


def _refuse_shared_rope(folder: Path, model: PreTrainedModel) -> None:
    """Some rotary embeddings change with the longest sequence of a forward pass, so one request
    would change another's output."""
    rope: Any = getattr(model.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise BackboneError(f"{folder}: rope_type {kind!r} is not supported in mixed batches")


def pick_device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, float32 on an older CPU, which would
    emulate bfloat16 several times slower."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def pick_fit_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """What a fit's frozen backbone computes in; what is learned is float32 always.

    bfloat16 on a CPU that would serve in it, at half the time a step. float32 elsewhere: float16's
    gradients overflow, and attention of bfloat16 on a GPU once looked ahead (`masked_attention`).
    """
    serves_in = pick_dtype(wanted, device)
    return torch.bfloat16 if (device.type, serves_in) == ("cpu", torch.bfloat16) else torch.float32


def decoder_start(model: PreTrainedModel) -> int | None:
    """What an encoder-decoder's answers begin with; None for a causal model. Raises
    `BackboneError` where the backbone does not say."""
    if not model.config.is_encoder_decoder:
        return None
    start: Any = getattr(model.generation_config, "decoder_start_token_id", None)
    start = model.config.decoder_start_token_id if start is None else start
    if not isinstance(start, int):
        raise BackboneError(f"decoder_start_token_id is {start!r}; expected a token id")
    return start


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The end-of-text tokens that the backbone's generation config names."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list) else [int(configured)]
