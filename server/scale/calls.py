"""What a gateway has to know of a call: who is to answer, and whether it may be sent twice."""

import json
from typing import Any

from starlette.requests import Request

ANSWERING = {
    "/generate": "task",
    "/score": "task",
    "/v1/completions": "model",
    "/v1/chat/completions": "model",
}
"""Calls that are answered from a task, and the member of their body that names it."""
READ_BYTES = 1 << 20
"""Of a larger body the task is not looked for: it is a routing that nobody has warm."""


def task_of(path: str, body: bytes) -> str:
    """The task whose warmth matters to a call; "" where there is none, or none can be told."""
    member = ANSWERING.get(path)
    if member is None or len(body) > READ_BYTES:
        return ""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    task = found.get(member) if isinstance(found, dict) else None
    return task if isinstance(task, str) else ""


def repeatable(method: str, path: str) -> bool:
    """Whether a second try can do no harm: nothing that reads or answers changes anything."""
    return method in ("GET", "HEAD") or path in ANSWERING


async def read_body(request: Request, most: int) -> bytes:
    """The body, or its first `most` + 1 bytes: too many for the replica, which refuses them."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            break
    return b"".join(parts)[: most + 1]
