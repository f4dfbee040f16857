"""Server-sent events: an answer as it grows."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyhead.server.engine.errors import EngineError
from polyhead.server.engine.request import Output
from polyhead.server.http.bridge import unless_client_leaves
from polyhead.server.http.errors import CallError, ClientGone
from polyhead.server.http.problems import problem_json, problem_of

DONE = b"data: [DONE]\n\n"

Encoder = Callable[[Output, bool], Iterable[dict[str, Any]]]
"""One output as the objects of events; the flag says whether it is the call's last."""


class Outputs(Protocol):
    """What one call gets back, from one request or from several."""

    @property
    def exhausted(self) -> bool:
        """Whether the batch that was read last holds the last output."""

    def batches(self) -> AsyncIterator[list[Output]]:
        """Everything that arrived since the last batch."""


class EventStream(Response):
    """Sends what `ask` yields, each output through `encode`, and lets go when the client does.

    The headers leave with the first output, so whatever goes wrong before it has a status of its
    own; after it, a problem is an `error` event and the stream ends without `[DONE]`.
    """

    def __init__(
        self,
        ask: AbstractAsyncContextManager[Outputs],
        encode: Encoder,
        write_error: Callable[[Exception], bytes] | None = None,
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._ask = ask
        self._encode = encode
        self._write_error = write_error or error_event
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await unless_client_leaves(receive, self._run(send))
        except ClientGone:
            if not self._started:
                raise

    async def _run(self, send: Send) -> None:
        async with self._ask as answer:
            try:
                async for batch in answer.batches():
                    await self._send(send, b"".join(self._events(batch, answer)))
            except (CallError, EngineError) as exc:
                if not self._started:
                    raise
                await self._send(send, self._write_error(exc))
            else:
                await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._started:
            self._started = True
            head = {"type": "http.response.start", "status": self.status_code}
            await send({**head, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _events(self, batch: list[Output], answer: Outputs) -> Iterator[bytes]:
        for place, output in enumerate(batch):
            last = answer.exhausted and place == len(batch) - 1
            yield from map(event, self._encode(output, last))


def event(data: dict[str, Any]) -> bytes:
    """One `data:` line and the blank line after it."""
    return b"data: " + to_json(data) + b"\n\n"


def error_event(exc: Exception) -> bytes:
    """A problem object as an event, for errors after the first byte."""
    return b"event: error\ndata: " + problem_json(problem_of(exc)) + b"\n\n"
