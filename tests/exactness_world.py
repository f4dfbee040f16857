"""A backbone with tasks of every kind, beside each of them its merged model alone; and a batch in
which some join and some leave while others decode."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from factories import (
    Collector,
    alone,
    merged,
    random_private,
    random_task,
    tiny_inventory,
)
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import mix
from polyhead.server.engine.engine import Engine, EngineStats
from polyhead.server.engine.request import Request

KINDS = ["routed", "other", "private", "mixture", "base"]


@dataclass(frozen=True)
class Served:
    """A backbone with adapters in it, and beside it every task's merged model."""

    model: PreTrainedModel
    injection: Injection
    adapters: dict[str, Adapter]
    references: dict[str, PreTrainedModel]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Served":
        torch.set_num_threads(1)
        inventory = tiny_inventory(model)
        routed, other = random_task(inventory, "routed", 1), random_task(inventory, "other", 2)
        adapters: dict[str, Adapter] = {
            "routed": routed,
            "other": other,
            "private": random_private(inventory, 3),
            "mixture": RoutedTask("mixture", mix([(routed.weights, 0.3), (other.weights, 0.7)])),
            "base": None,
        }
        references = {kind: merged(model, inventory, adapters[kind]) for kind in KINDS}
        return cls(model, inject(model, inventory), adapters, references)


def wait_until_first_token(collector: Collector, request: Request) -> None:
    until = time.monotonic() + 60
    while request.id not in collector.events:
        assert time.monotonic() < until
        time.sleep(0.002)


def answer_in_motion(
    bench: Served,
    engine: Engine,
    collector: Collector,
    asked: Sequence[Request],
    leaving: Sequence[Request],
) -> tuple[dict[str, list[int]], EngineStats]:
    """The answers by id, and the engine's figures at the end.

    Some of `asked` join while others decode; `leaving`, of the bare backbone, are aborted then, and
    what they got so far must be what the backbone says.
    """
    engine.start()
    for request in [*leaving, *asked[:7]]:
        engine.submit(request)
    wait_until_first_token(collector, asked[0])
    for request in asked[7:]:
        engine.submit(request)
    for request in leaving:
        engine.abort(request.id)
    answers = {request.id: collector.tokens(request) for request in asked}
    for request in leaving:
        said = collector.tokens(request)
        assert said == alone(bench.references["base"], request)[: len(said)]
    stats = engine.stats()
    engine.stop()
    return answers, stats
