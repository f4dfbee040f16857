"""Runners of a backbone that is cut over several processes: one leads, the others follow."""

from collections.abc import Sequence as Ordered
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from polyhead.adapters.costs import FormCosts
from polyhead.adapters.inject import Injection
from polyhead.adapters.plan import adapter_key
from polyhead.server.engine.batch import Batch, Row, Sampled
from polyhead.server.engine.errors import EngineDead, WorkerLost
from polyhead.server.engine.kv_space import KVOperation, Place
from polyhead.server.engine.request import Request
from polyhead.server.engine.runner import Packed, Runner
from polyhead.server.engine.sequence import Sequence
from polyhead.server.engine.step_message import Known, Told, operations_as_json, operations_of
from polyhead.server.engine.team import Team


class LeadingRunner(Runner):
    """Tells the others of all it does, before it does it.

    Whatever fails in the middle of a step leaves them waiting for a sum that does not come, so it
    ends the engine: `WorkerLost`.
    """

    def __init__(
        self, model: PreTrainedModel, injection: Injection, capacities: Ordered[int], team: Team
    ) -> None:
        self._team = team
        self._costs = injection.planner.costs
        super().__init__(model, injection, capacities)

    def reset(self) -> None:
        self._told = Told()
        costs = asdict(self._costs)  # everybody is to choose the same forms
        self._team.tell({"do": "reset", "capacities": list(self._capacities), "costs": costs})
        super().reset()

    def carry_out(self, operations: Ordered[KVOperation]) -> None:
        if operations:
            self._team.tell({"do": "move", "operations": operations_as_json(operations)})
        super().carry_out(operations)

    def run(self, batch: Batch) -> list[Sampled]:
        try:
            return super().run(batch)
        except EngineDead:
            raise
        except Exception as exc:
            raise WorkerLost(f"a step failed in the leading process: {exc}") from exc

    def _forward(self, packed: Packed) -> torch.Tensor:
        adapters = [row.sequence.request.adapter for row in packed.rows]
        news, data = self._told.news(adapters)
        rows = [
            (adapter_key(adapter), row.start, row.count, row.place.arena, row.place.row)
            for adapter, row in zip(adapters, packed.rows, strict=True)
        ]
        self._team.tell({"do": "step", **news, "ids": packed.ids, "rows": rows}, data)
        return super()._forward(packed)


class FollowingRunner:
    """Does what a `LeadingRunner` tells, and throws the results away: the other has them too."""

    def __init__(self, model: PreTrainedModel, injection: Injection) -> None:
        self._model = model
        self._injection = injection
        self._known = Known()
        self._runner: Runner | None = None

    def obey(self, message: dict[str, Any], data: bytes) -> None:
        """Reset, move or step. Raises `ValueError` for anything else."""
        if message["do"] == "reset":
            self._injection.planner.costs = FormCosts(**message["costs"])
            self._known = Known()
            self._runner = Runner(self._model, self._injection, message["capacities"])
        elif message["do"] == "move" and self._runner is not None:
            self._runner.carry_out(operations_of(message["operations"]))
        elif message["do"] == "step" and self._runner is not None:
            self._learn(message, data)
            self._runner.compute(self._packed(message))
        else:
            raise ValueError(f"not a message that can be followed: {message['do']}")

    def _learn(self, message: dict[str, Any], data: bytes) -> None:
        for key, adapter in self._known.take(message, data):
            prepared = self._injection.planner.prepare(adapter)
            if prepared.key != key:
                raise ValueError(f"adapter {key} has arrived as {prepared.key}")
            self._known.keep(prepared)

    def _packed(self, message: dict[str, Any]) -> Packed:
        rows, positions = list[Row](), list[int]()
        for key, start, count, arena, row in message["rows"]:
            request = Request("", "", "", (), self._known[key])
            rows.append(Row(Sequence(request, 0, []), start, count, Place(arena, row)))
            positions += range(start, start + count)
        return Packed(rows, message["ids"], positions)
