"""Submitting what a call asks, and sending what comes back."""

from collections.abc import Sequence

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from polyhead.server.engine import request as engine
from polyhead.server.http.bridge import unless_client_leaves
from polyhead.server.http.openai.asking import ask_all
from polyhead.server.http.openai.errors import error_event
from polyhead.server.http.openai.writing import Writer
from polyhead.server.http.service import Service
from polyhead.server.http.stream import EventStream


async def answered(
    request: Request,
    service: Service,
    asked: Sequence[engine.Request],
    writer: Writer,
    *,
    streamed: bool,
) -> Response:
    """The answer of `asked`, as `writer` writes it. Raises what submitting raises."""
    ask = ask_all(service.bridge, service.engine, asked)
    if streamed:
        return EventStream(ask, writer, error_event)

    async def collected() -> bytes:
        async with ask as answers:
            outputs = [output async for batch in answers.batches() for output in batch]
        return await service.pool.run(written, outputs)

    def written(outputs: list[engine.Output]) -> bytes:
        return to_json(writer.whole(outputs))

    whole = await unless_client_leaves(request.receive, collected())
    return Response(whole, media_type="application/json")
