"""A request id for every call, in its answer's headers, in the log and in traces."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyhead.server.logs import Call, current_call

logger = logging.getLogger(__name__)

HEADER = "X-Request-Id"
GENERATION_HEADER = "X-Task-Generation"
WELL_FORMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
QUIET = ("/health/", "/metrics")
"""Calls that come every few seconds: they are logged for who debugs."""


class RequestIds:
    """ASGI middleware. A client's well-formed id is taken; without one the call gets our own.

    The engine and the answer always carry an id of our own: the engine relies on unique ones, and
    a client that tries again may send the same.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call, began, status = _call_of(Headers(scope=scope)), time.monotonic(), 0
        scope.setdefault("state", {})["request_id"] = call.answer_id

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[HEADER] = call.request_id
                if call.generation is not None:
                    headers[GENERATION_HEADER] = call.generation
            await send(message)

        token = current_call.set(call)
        try:
            await self.app(scope, receive, tagged)
        finally:
            if not call.asked:
                _log(scope, status, time.monotonic() - began)
            current_call.reset(token)


def _call_of(headers: Headers) -> Call:
    own = uuid.uuid4().hex
    given = headers.get(HEADER, "")
    taken = given if WELL_FORMED.fullmatch(given) else own
    return Call(taken, own, traceparent=headers.get("traceparent"))


def _log(scope: Scope, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"].startswith(QUIET) else logging.INFO
    if logger.isEnabledFor(level):
        fields = {"method": scope["method"], "path": scope["path"], "status": status}
        fields["seconds"] = round(seconds, 6)
        logger.log(level, "call ended", extra={"fields": fields})
