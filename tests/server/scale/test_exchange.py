"""A call to an application as a function: whole, in pieces, broken off, broken."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from polyhead.server.scale.exchange import exchange, portable

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Speaker:
    """An application that echoes its body piece by piece until its client leaves."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.sent = 0
        self.left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self.pieces):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.sent += 1
        self.left = (await receive())["type"] == "http.disconnect"


async def take(messages: AsyncGenerator[Message, None], count: int) -> list[Message]:
    return [await anext(messages) for _ in range(count)]


async def test_messages_come_in_order_and_one_at_a_time() -> None:
    app = Speaker(3)
    messages = exchange(app, SCOPE, b"hi")
    assert (await anext(messages))["status"] == 200
    await asyncio.sleep(0)
    assert app.sent == 0  # nothing is made ahead of whoever reads
    assert [message["body"] for message in await take(messages, 3)] == [b"hi"] * 3
    await messages.aclose()


async def test_leaving_is_a_disconnect_and_waits_for_the_application() -> None:
    app = Speaker(1000)
    messages = exchange(app, SCOPE, b"hi")
    await take(messages, 5)
    await messages.aclose()
    assert app.left
    control = Speaker(2)
    async with contextlib.aclosing(exchange(control, SCOPE, b"hi")) as unbroken:
        await take(unbroken, 3)
        assert not control.left


async def test_what_the_application_raises_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError("lost")

    messages = exchange(broken, SCOPE, b"")
    await anext(messages)
    with pytest.raises(LookupError, match="lost"):
        await anext(messages)


def test_a_scope_is_sent_without_what_belongs_to_its_process() -> None:
    scope = {**SCOPE, "query_string": b"a=1", "app": object(), "state": {}, "extensions": {}}
    assert portable(scope) == {**SCOPE, "query_string": b"a=1"}
