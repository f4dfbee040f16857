"""One HTTP call to an ASGI application as a function: a scope and a body in, messages out."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PORTABLE = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)
"""Members of a scope that mean something in another process."""


def portable(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scope can be sent to another process."""
    return {key: scope[key] for key in PORTABLE if key in scope}


async def exchange(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Yield what the application sends, as it sends it; it waits until each message is taken.

    Whoever stops early leaves like a client: the application is told of the disconnect and waited
    for. Raises what the application raises.
    """
    taken, given = anyio.create_memory_object_stream[Message](0)
    left = asyncio.Event()
    call = asyncio.ensure_future(_run(app, scope, _receiving(body, left), taken))
    try:
        async for message in given:
            yield message
        await call
    finally:
        left.set()
        given.close()
        with contextlib.suppress(Exception):
            await asyncio.shield(call)


def _receiving(body: bytes, left: asyncio.Event) -> Receive:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    return receive


async def _run(app: ASGIApp, scope: Scope, receive: Receive, taken: Any) -> None:
    async def send(message: Message) -> None:
        with contextlib.suppress(anyio.BrokenResourceError):  # nobody listens any more
            await taken.send(message)

    speak: Send = send
    async with taken:
        await app(dict(scope), receive, speak)
