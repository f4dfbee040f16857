"""From settings to an engine that is ready to start."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.measuring import measure_costs
from polyhead.server.config import Settings
from polyhead.server.engine.attention import UnsupportedAttention
from polyhead.server.engine.backbone import decoder_start, end_tokens, find_backbone
from polyhead.server.engine.engine import Engine, Publish, Watch
from polyhead.server.engine.errors import BackboneError
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.parts import PartOptions, join, load_part
from polyhead.server.engine.prefix_cache import PrefixCache
from polyhead.server.engine.quantized import check_quantize
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.shared_runners import LeadingRunner
from polyhead.server.engine.source_cache import SourceCache
from polyhead.server.engine.source_runner import SourceRunner
from polyhead.server.engine.team import Team
from polyhead.server.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SOURCE_TOKENS = 2048
"""Longest source and answer where neither the backbone nor a setting says: T5's biases end nowhere,
but a source is encoded in at most as many steps as there are layers, however long it is."""
STEP_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of a step by device: what takes a few tenths of a second on a CPU, tens of ms on a GPU."""


@dataclass(frozen=True)
class Loaded:
    """A backbone with its inventory injected, and everything to build an engine from."""

    settings: Settings
    folder: Path  # of the backbone
    model: PreTrainedModel
    tokenizer: Tokenizer
    inventory: Inventory
    injection: Injection
    backbone: BackboneRef
    max_context: int
    team: Team | None = None  # the processes with the other parts, where there are any

    def close(self) -> None:
        """End the other processes."""
        if self.team is not None:
            self.team.close()

    def engine(
        self,
        publish: Publish,
        on_death: Callable[[BaseException], None] | None = None,
        watch: Watch | None = None,
    ) -> Engine:
        """A new engine over this backbone; start it, and use one at a time."""
        settings = self.settings
        if self.team is not None and on_death is not None:
            self.team.on_loss = on_death
        device = next(self.model.parameters()).device.type
        step_tokens = settings.max_step_tokens or STEP_TOKENS.get(device, STEP_TOKENS["cuda"])
        config = SchedulerConfig(settings.max_running, max(step_tokens, settings.max_running))
        kept = settings.prefix_cache_tokens
        encodes = self.model.config.is_encoder_decoder
        space = KVSpace(settings.kv_cache_tokens, self.max_context, parking=kept > 0 or encodes)
        runner = self._runner(space)
        reuse = self._sources(space, config) if encodes else PrefixCache(space, kept)
        try:
            runner.probe()
        except UnsupportedAttention as exc:
            raise BackboneError(f"{settings.backbone}: {exc}, which is not supported") from exc
        return Engine(
            runner,
            Scheduler(config, space, reuse),
            self.tokenizer,
            publish,
            max_waiting=settings.max_waiting,
            max_wait=settings.max_wait_seconds,
            on_death=on_death,
            watch=watch,
        )

    def _runner(self, space: KVSpace) -> Runner:
        if self.team is not None:
            return LeadingRunner(self.model, self.injection, space.capacities, self.team)
        kind = SourceRunner if self.model.config.is_encoder_decoder else Runner
        return kind(self.model, self.injection, space.capacities)

    def _sources(self, space: KVSpace, config: SchedulerConfig) -> SourceCache:
        step_tokens, depth = config.max_step_tokens, self.model.config.num_layers
        kept = self.settings.prefix_cache_tokens
        return SourceCache(space, kept, step_tokens=step_tokens, depth=depth)


def load(settings: Settings) -> Loaded:
    """Read backbone, tokenizer and inventory; with `tensor_parallel`, on several processes.

    Raises `BackboneError`, `InventoryError`, `InjectionError` or `WorkerLost`, each naming file,
    module or process.
    """
    if settings.quantize is not None:
        check_quantize(settings.quantize, settings.tensor_parallel)
    team = Team(settings.tensor_parallel) if settings.tensor_parallel > 1 else None
    try:
        return _load(settings, team)
    except BaseException:
        if team is not None:
            team.close()
        raise


def _load(settings: Settings, team: Team | None) -> Loaded:
    folder = find_backbone(settings.backbone)
    options = PartOptions.of(settings, folder)
    part = load_part(options, None if team is None else team.ranks)
    if team is not None:
        team.tell({"rendezvous": team.rendezvous, **vars(options)})
        join(team.ranks, team.rendezvous, part.device)
    part.inventory.check_generator(part.model.config.hidden_size)
    injection = inject(part.model, part.inventory)
    injection.planner.costs = measure_costs([slot.group for slot in injection.slots])
    logger.info("seconds per form: %s", injection.planner.costs)
    tokenizer = Tokenizer.load(folder, end_tokens(part.model), decoder_start(part.model))
    logger.info("backbone %s on %s as %s", part.backbone.name, part.device, part.model.dtype)
    return Loaded(
        settings,
        folder,
        part.model,
        tokenizer,
        part.inventory,
        injection,
        part.backbone,
        _context(part.model, settings),
        team,
    )


def _context(model: PreTrainedModel, settings: Settings) -> int:
    declared = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    unbounded = model.config.is_encoder_decoder and settings.max_context is None
    limit = declared or (SOURCE_TOKENS if unbounded else settings.kv_cache_tokens)
    return min(limit, settings.max_context or limit, settings.kv_cache_tokens)
