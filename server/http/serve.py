"""From settings to a listening process, and from SIGTERM to its end."""

import asyncio
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from polyhead.server import logs
from polyhead.server.config import Settings
from polyhead.server.engine.loading import load
from polyhead.server.http.app import create_app
from polyhead.server.http.auth import is_loopback
from polyhead.server.http.connection import cutting_off
from polyhead.server.http.keys import KeysFileError, read_keys
from polyhead.server.http.service import Service
from polyhead.server.tasks.options import Options
from polyhead.server.tasks.registry import Registry

FLUSH_SECONDS = 5
"""How long finished answers may take to leave after the engine is done."""


class Server(uvicorn.Server):
    """A uvicorn server that drains on the first signal and leaves at once on the second.

    While it drains it keeps listening, so that /health/ready and refusals are still answered. A
    balancer that asks for the former during `drain_delay_seconds` never meets the latter.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                access_log=False,
                log_config=None,
                server_header=False,
                ws="none",
                http=cutting_off(settings.stream_stall_seconds),
                timeout_keep_alive=65,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._app = app
        self._delay_seconds = settings.drain_delay_seconds
        self._drain_seconds = settings.drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Called by uvicorn on SIGINT and SIGTERM, between two bytecodes of the main thread."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop that signals are handed to once calls can be running on it."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: also when the engine has died, since nothing can be answered then."""
        return await super().on_tick(counter) or self.engine_died

    @property
    def engine_died(self) -> bool:
        """Whether the engine's thread has ended by itself."""
        service: Service = self._app.state.service
        return service.bridge.death is not None

    def begin_drain(self) -> None:
        """Say so, take nothing new in after a while, let what runs finish, then stop. Call on the
        event loop."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service: Service = self._app.state.service
        service.leaving.set()
        await asyncio.sleep(self._delay_seconds)
        end = time.monotonic() + self._drain_seconds
        try:
            await asyncio.gather(
                asyncio.to_thread(service.engine.drain, self._drain_seconds),
                asyncio.to_thread(service.lane.stop, self._drain_seconds),
            )
            while service.bridge.waiting and time.monotonic() < end:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(service.engine.stop)  # aborts, and so answers, what is left
        finally:
            self.should_exit = True


def run(settings: Settings) -> int:
    """Serve until a signal. Returns the exit status: 0 drained, 1 the engine died, 2 refused.

    Raises `AdapterError`, `EngineError`, `RegistryError` or `OSError` where something that
    `settings` names cannot be loaded.
    """
    refusal = _refusal(settings)
    if refusal is not None:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    logs.configure(settings.log_format, settings.log_level)
    loaded = load(settings)
    inventory = loaded.inventory
    registry = Registry(
        settings.data_dir, inventory.fingerprint, inventory.layout, Options.of(settings)
    )
    try:
        registry.seed(inventory)
        server = Server(create_app(settings, loaded, registry), settings)
        server.run()
        return 0 if server.started and not server.engine_died else 1
    finally:
        registry.close()
        loaded.close()


def _refusal(settings: Settings) -> str | None:
    """Why these settings are not served, before anything is loaded; None where they are."""
    if settings.api_keys_file is not None:
        try:
            read_keys(settings.api_keys_file)
        except KeysFileError as exc:
            return f"--api-keys-file {exc}"
        return None
    if settings.allow_remote or is_loopback(settings.host):
        return None
    return (
        f"--host {settings.host}: only a loopback address is served, because whoever reaches the "
        "port may use and change every task; give keys with --api-keys-file, or --allow-remote "
        "where something else keeps strangers out"
    )
