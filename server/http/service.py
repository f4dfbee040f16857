"""The parts of one running server, as the calls find them."""

import asyncio
from dataclasses import dataclass, field

from fastapi import Request

from polyhead.adapters.inventory import Inventory
from polyhead.server.config import Settings
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.errors import EngineDead, EngineDraining, EngineError
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.fitting.board import Board
from polyhead.server.fitting.lane import Lane
from polyhead.server.http.admission import Admission
from polyhead.server.http.bodies import Pool
from polyhead.server.http.bridge import ENGINE_STOPPED, Bridge
from polyhead.server.http.callers import Callers
from polyhead.server.http.room import Room
from polyhead.server.metrics import Metrics
from polyhead.server.tasks.jobs import Jobs
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots


@dataclass(frozen=True)
class Service:
    """Everything a call may need; lives as long as the app's lifespan."""

    settings: Settings
    engine: Engine
    bridge: Bridge
    tokenizer: Tokenizer
    inventory: Inventory
    registry: Registry
    jobs: Jobs
    board: Board
    lane: Lane
    admission: Admission
    callers: Callers
    metrics: Metrics
    pool: Pool
    slots: Slots
    room: Room
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server was told to end, maybe some time before it refuses anything."""

    def why_not_ready(self) -> EngineError | None:
        """What a request would be refused with now or, where the server is to end, very soon."""
        if self.bridge.death is not None:
            return EngineDead(ENGINE_STOPPED)
        if self.leaving.is_set() or self.engine.draining:
            return EngineDraining("the server is shutting down")
        if not self.engine.alive:
            return EngineDead(ENGINE_STOPPED)
        return None


async def the_service(request: Request) -> Service:
    """A dependency: the app's one `Service`. Plain functions would be called in a thread."""
    service: Service = request.app.state.service
    return service


def request_id(request: Request) -> str:
    """The id that this call carries in the engine, in its answer and in the log."""
    found: str = request.scope["state"]["request_id"]
    return found
