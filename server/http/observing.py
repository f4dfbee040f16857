"""Who is told how a request went, and what is read when Prometheus asks."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from polyhead.server.config import Settings
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.http.service import Service
from polyhead.server.metrics import Journey, Reading, Witness
from polyhead.server.metrics.loras import active_adapters
from polyhead.server.tasks.errors import RegistryUnavailable

logger = logging.getLogger(__name__)


class RequestLog:
    """Logs every request that reached the engine; what it said only where that is asked for."""

    def __init__(self, tokenizer: Tokenizer, with_prompts: bool) -> None:
        self._tokenizer = tokenizer
        self._with_prompts = with_prompts

    def __call__(self, journey: Journey) -> None:
        level = logging.INFO if journey.error is None else logging.WARNING
        if logger.isEnabledFor(level):
            logger.log(level, "request ended", extra={"fields": self._fields(journey)})

    def _fields(self, journey: Journey) -> dict[str, Any]:
        request, call = journey.request, journey.call
        fields: dict[str, Any] = {
            "request_id": call.request_id if call is not None else request.id,
            "answer_id": request.id,
            "task": request.task,
            "generation": request.generation,
            "prompt_tokens": len(request.asked),
            "cached_tokens": journey.cached_tokens,
            "completion_tokens": journey.tokens,
            "finish_reasons": journey.reasons,
        }
        for name in ("queue_seconds", "prefill_seconds", "decode_seconds", "seconds"):
            value = getattr(journey, name)
            fields[name] = None if value is None else round(value, 6)
        if journey.error is not None:
            fields["error"] = journey.error
        if self._with_prompts:
            fields["prompt"] = self._tokenizer.decode(request.asked)
        return fields


@dataclass(frozen=True)
class Witnesses:
    """Everybody who is told of each request's end."""

    all: Sequence[Witness]
    close: Callable[[], None] = lambda: None


def witnesses(settings: Settings, tokenizer: Tokenizer) -> Witnesses:
    """The log, and where they are switched on, traces. Tracing is imported only there.

    Raises `ImportError` where it is on and its packages are missing.
    """
    log = RequestLog(tokenizer, settings.log_prompts)
    if settings.otlp_endpoint is None:
        return Witnesses([log])
    from polyhead.server.tracing import Tracing

    tracing = Tracing(settings.otlp_endpoint)
    return Witnesses([log, tracing], tracing.shutdown)


def watch(service: Service) -> None:
    """Register everything that is read at a scrape."""
    for read in (engine_readings, task_readings, registry_readings):
        service.metrics.watch(lambda read=read: read(service))  # type: ignore[misc]


def engine_readings(service: Service) -> Iterator[Reading]:
    """The engine's state as of its last step."""
    stats, settings = service.engine.stats(), service.settings
    used, capacity = stats.kv_used_tokens, stats.kv_capacity_tokens
    yield Reading("num_requests_running", "Sequences in the batch, one per choice", stats.running)
    yield Reading("num_requests_waiting", "Sequences in line, one per choice", stats.waiting)
    yield Reading(
        "kv_cache_usage_perc",
        "Share of the key-value cache in use, 0 to 1",
        used / max(1, capacity),
    )
    yield Reading("kv_cache_capacity_tokens", "Tokens that the key-value cache holds", capacity)
    yield Reading("max_num_requests_running", "Seats in the batch", settings.max_running)
    yield Reading("max_num_requests_waiting", "Line before 503", settings.max_waiting)
    yield Reading("num_preemptions", "Sequences preempted", stats.preemptions, kind="counter")
    yield Reading("failed_steps", "Steps that raised", stats.failed_steps, kind="counter")
    yield Reading("ready", "1 when a request would be taken in", service.why_not_ready() is None)
    yield active_adapters(*service.engine.active_tasks(), settings.max_running)
    yield Reading(
        "info",
        "What is served",
        1,
        {
            "backbone": service.inventory.header.backbone.name,
            "inventory": service.inventory.fingerprint[:16],
        },
    )


def task_readings(service: Service) -> Iterator[Reading]:
    """What the catalogue keeps in memory."""
    catalogue = service.admission.answerers.catalogue
    yield Reading("tasks_resident", "Tasks ready in memory", len(catalogue))
    yield Reading("tasks_resident_bytes", "Memory that they take", catalogue.nbytes)
    yield Reading(
        "tasks_resident_limit_bytes", "Memory that they may take", service.settings.task_cache_bytes
    )
    slots = service.slots
    yield Reading("private_adapters_resident", "Private adapters in slots", len(slots))
    yield Reading("private_adapters_pinned", "Of them, those that requests run with", slots.pinned)
    yield Reading("private_adapters_bytes", "Memory that they take", slots.nbytes)
    loads = "Private adapters brought into a slot"
    yield Reading("private_adapter_loads", loads, slots.loads, kind="counter")
    yield Reading(
        "private_adapter_evictions",
        "Private adapters that made room",
        slots.evictions,
        kind="counter",
    )
    yield Reading(
        "registry_convergence_lag_seconds",
        "For how long changes of other replicas may have been missed",
        service.registry.convergence_lag,
    )


def registry_readings(service: Service) -> Iterator[Reading]:
    """What the database knows, and whether it answers."""
    try:
        tasks, jobs = service.registry.count(), service.jobs.counts()
    except RegistryUnavailable:
        yield Reading("registry_up", "1 when the registry answers", 0)
        return
    yield Reading("registry_up", "1 when the registry answers", 1)
    yield Reading("tasks_registered", "Tasks in the registry", tasks)
    yield Reading("fit_jobs_queued", "Fits in line", jobs.get("queued", 0))
    yield Reading("fit_jobs_running", "Fits being computed", jobs.get("running", 0))
