"""Limits that hold before any byte of a body is understood."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyhead.server.http.errors import BodyTooLarge, UnsupportedContent

JSON = "application/json"
MULTIPART = "multipart/form-data"


class BodyLimit:
    """ASGI middleware: a call whose body exceeds `limit` bytes raises `BodyTooLarge` in the app.

    A stated length is believed only when it is too large; the bytes are counted as they arrive,
    so chunked bodies are held to the same limit.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        too_large = stated.isdecimal() and int(stated[:20]) > self.limit
        received = 0

        async def counted() -> Message:
            nonlocal received
            if too_large:
                raise BodyTooLarge(self.limit)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise BodyTooLarge(self.limit)
            return message

        await self.app(scope, counted, send)


def content_type(request: Request, *accepted: str) -> str:
    """Which of the `accepted` types the body has. Raises `UnsupportedContent` on any other."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedContent(f"content encoding {encoding[:60]!r} is not read; send it plain")
    stated = request.headers.get("content-type", "")
    kind = stated.partition(";")[0].strip().lower()
    if kind not in accepted:
        found = repr(stated[:60]) if stated else "none"
        raise UnsupportedContent(f"content type {found}; expected {' or '.join(accepted)}")
    return kind
