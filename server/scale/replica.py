"""The deployment that answers: one whole Polyhead server without a port of its own."""

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from starlette.types import Message

from polyhead.server.config import Settings
from polyhead.server.scale.exchange import exchange

logger = logging.getLogger(__name__)


class Replica:
    """Loads backbone and inventory, opens the shared registry, and runs the application.

    settings: a server's, as a mapping: the object itself may be of another version.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        # Only here: the gateway's process needs no torch.
        from polyhead.server.engine.loading import load
        from polyhead.server.http.app import create_app
        from polyhead.server.tasks.options import Options
        from polyhead.server.tasks.registry import Registry

        given = Settings(**settings)
        self._name = serve.get_replica_context().replica_id.unique_id
        own = given.data_dir / self._name
        mine = given.model_copy(update={"data_dir": own})
        self._loaded = loaded = load(mine)
        inventory = loaded.inventory
        self._registry = Registry(own, inventory.fingerprint, inventory.layout, Options.of(mine))
        self._registry.seed(inventory)
        self._app = create_app(mine, loaded, self._registry)
        self._running = contextlib.AsyncExitStack()
        self._started = False

    async def _start(self) -> None:
        """The application's own beginning needs the event loop that calls run on."""
        if not self._started:
            self._started = True
            await self._running.enter_async_context(self._app.router.lifespan_context(self._app))

    async def call(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages that answer one call."""
        await self._start()
        messages = exchange(self._app, scope, body)
        async with contextlib.aclosing(messages):
            async for message in messages:
                yield self._signed(message)

    async def answer(self, scope: dict[str, Any]) -> tuple[str, list[Message]]:
        """This replica's name, and the whole answer to a call without a body."""
        return self._name, [message async for message in self.call(scope, b"")]

    def _signed(self, message: Message) -> Message:
        """The answer says who gave it: without that, a balance cannot be looked into."""
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-replica", self._name.encode())]
        return message

    async def check_health(self) -> None:
        """Raises where the engine has ended, so that Serve replaces this replica."""
        await self._start()
        refusal = self._app.state.service.why_not_ready()
        if refusal is not None:
            raise refusal

    async def __del__(self) -> None:
        """Serve calls this when the last call has been answered, or its time is up."""
        await self._running.aclose()
        self._registry.close()
        self._loaded.close()
