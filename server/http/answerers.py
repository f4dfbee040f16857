"""Who answers a request: a stored task, a mixture of tasks or a routing in the body."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import Routing, RoutingKind, mix
from polyhead.server.http.callers import the_caller
from polyhead.server.http.checks import check_most, from_base64, unknown_task
from polyhead.server.http.errors import InvalidValue
from polyhead.server.http.schemas import INPUT, Asking, RoutingBody, exactly_one
from polyhead.server.tasks.catalogue import Catalogue, ResolvedTask
from polyhead.server.tasks.errors import UnknownTask


@dataclass(frozen=True)
class Answerer:
    """Who answers: a stored task, a mixture of tasks or an inline routing."""

    name: str
    generation: str
    adapter: Adapter
    template: str = INPUT
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answerers:
    """Finds who answers. May read the registry: call it in a thread."""

    catalogue: Catalogue
    inventory: Inventory
    max_mixture: int

    def find(self, body: Asking) -> Answerer:
        """Raises `InvalidValue`, `RoutingError`, `RegistryUnavailable`."""
        if body.task is not None:
            found = self._resolve("task", body.task)
            task = found.task
            return Answerer(
                task.id, task.generation, found.adapter, task.template or INPUT, task.defaults
            )
        if body.mixture is not None:
            return self._mixture(body.mixture)
        routing = read_routing(body.routing or RoutingBody(), self.inventory)
        key = f"routing:{routing.fingerprint}"
        return Answerer("(routing)", key, RoutedTask(key, routing.weights(self.inventory.layout)))

    def _resolve(self, field: str, task_id: str) -> ResolvedTask:
        if not the_caller().may_see(task_id):
            raise unknown_task(field, task_id)
        try:
            return self.catalogue.resolve(task_id)
        except UnknownTask as exc:
            raise unknown_task(field, task_id) from exc

    def _mixture(self, mixture: Mapping[str, float]) -> Answerer:
        check_most("mixture", len(mixture), self.max_mixture)
        parts, digest, total = [], hashlib.sha256(), sum(mixture.values())
        for task_id, share in sorted(mixture.items()):
            found = self._resolve(f"mixture.{task_id}", task_id)
            if not isinstance(found.adapter, RoutedTask):
                raise InvalidValue.of(
                    f"mixture.{task_id}",
                    "only tasks with a routing can be mixed",
                    found="the bare backbone" if found.adapter is None else "a private adapter",
                    expected="a task with a routing",
                )
            parts.append((found.adapter.weights, share))
            digest.update(f"{found.task.generation}:{share / total!r};".encode())
        key = f"mixture:{digest.hexdigest()}"
        return Answerer("(mixture)", key, RoutedTask(key, mix(parts)))


def read_routing(body: RoutingBody, inventory: Inventory) -> Routing:
    """The routing of a body, checked against `inventory`. Raises `RoutingError`, `InvalidValue`."""
    form = exactly_one(body, "logits", "weights", "coefficients", "safetensors", prefix="routing.")
    layout = inventory.layout
    if body.safetensors is not None:
        routing = Routing.from_safetensors(
            from_base64("routing.safetensors", body.safetensors), layout
        )
        if "granularity" in body.model_fields_set and body.granularity != routing.granularity:
            raise InvalidValue.of(
                "routing.granularity",
                "differs from the file's",
                found=repr(body.granularity),
                expected=repr(routing.granularity),
            )
        return routing
    kind = cast(RoutingKind, form)
    return Routing.from_nested(getattr(body, form), layout, kind, body.granularity)
