"""From settings to an engine that is ready to start."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from polyhead.adapters.costs import measure_costs
from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.server.config import Settings
from polyhead.server.engine.attention import UnsupportedAttention
from polyhead.server.engine.engine import Engine, Publish
from polyhead.server.engine.errors import BackboneError
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEP_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of a step by device: what takes a few tenths of a second on a CPU, tens of ms on a GPU."""


@dataclass(frozen=True)
class Loaded:
    """A backbone with its inventory injected, and everything to build an engine from."""

    settings: Settings
    model: PreTrainedModel
    tokenizer: Tokenizer
    inventory: Inventory
    injection: Injection
    backbone: BackboneRef
    max_context: int

    def engine(
        self, publish: Publish, on_death: Callable[[BaseException], None] | None = None
    ) -> Engine:
        """A new engine over this backbone; start it, and use one at a time."""
        settings = self.settings
        device = next(self.model.parameters()).device.type
        step_tokens = settings.max_step_tokens or STEP_TOKENS.get(device, STEP_TOKENS["cuda"])
        config = SchedulerConfig(settings.max_running, max(step_tokens, settings.max_running))
        space = KVSpace(settings.kv_cache_tokens, self.max_context)
        runner = Runner(self.model, self.injection, space.capacities)
        try:
            runner.probe()
        except UnsupportedAttention as exc:
            raise BackboneError(f"{settings.backbone}: {exc}, which is not supported") from exc
        return Engine(
            runner,
            Scheduler(config, space),
            self.tokenizer,
            publish,
            max_waiting=settings.max_waiting,
            on_death=on_death,
        )


def load(settings: Settings) -> Loaded:
    """Read backbone, tokenizer and inventory from disk; nothing is downloaded.

    Raises `BackboneError`, `InventoryError` or `InjectionError`, each naming file or module.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    model = load_backbone(settings.backbone, pick_dtype(settings.dtype, device), device)
    reference = BackboneRef.of(model, Path(settings.backbone).name)
    inventory = Inventory.load(settings.inventory)
    inventory.check_backbone(reference)
    injection = inject(model, inventory)
    injection.planner.costs = measure_costs([slot.group for slot in injection.slots])
    logger.info("seconds per form: %s", injection.planner.costs)
    tokenizer = Tokenizer.load(Path(settings.backbone), end_tokens(model))
    limit = int(getattr(model.config, "max_position_embeddings", 0) or settings.kv_cache_tokens)
    context = min(limit, settings.max_context or limit, settings.kv_cache_tokens)
    logger.info("backbone %s on %s as %s", reference.name, device, model.dtype)
    return Loaded(settings, model, tokenizer, inventory, injection, reference, context)


def load_backbone(folder: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal model from a local transformers folder, frozen and in evaluation mode."""
    if not (Path(folder) / "config.json").is_file():
        raise BackboneError(
            f"{folder}: no config.json; expected the folder of a transformers model"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as exc:
        raise BackboneError(f"{folder}: {exc}") from exc
    model: PreTrainedModel = loaded.to(device).eval().requires_grad_(False)
    _refuse_shared_rope(folder, model)
    return model


def _refuse_shared_rope(folder: str, model: PreTrainedModel) -> None:
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


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The end-of-text tokens that the backbone's generation config names."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list) else [int(configured)]
