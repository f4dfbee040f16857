"""The deployment that listens: reads a call, finds its task, and passes it to a replica."""

import logging
from collections.abc import AsyncIterator
from typing import Any, cast

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from polyhead.server.http.errors import ReplicaLost
from polyhead.server.http.openai.errors import error_body
from polyhead.server.http.openai.errors import error_event as openai_error_event
from polyhead.server.http.problems import native, problem_response
from polyhead.server.http.stream import error_event
from polyhead.server.scale.calls import read_body, repeatable, task_of
from polyhead.server.scale.exchange import portable
from polyhead.server.scale.merging import merged

logger = logging.getLogger(__name__)

LOST = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    RaySystemError,
    WorkerCrashedError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
"""What a call ends in when its replica, or the replica's machine, is gone."""
TRIES = 3
METRICS_SECONDS = 5.0
"""How long replicas may take to tell their metrics; Prometheus waits for 10 s."""

Messages = DeploymentResponseGenerator[Message]


class Gateway:
    """Needs no backbone, so it is cheap to have one on every machine.

    A call whose replica is lost is tried again elsewhere as long as nothing of its answer has left
    and trying twice does no harm. Otherwise it ends: as 503, or as an error in its stream.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int) -> None:
        self._replicas = replicas
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP call."""
        path = request.url.path
        if (request.method, path) == ("GET", "/metrics"):
            return await self._metrics(portable(request.scope))
        body = await read_body(request, self._max_body_bytes)
        handle = self._replicas.options(
            stream=True, method_name="call", multiplexed_model_id=task_of(path, body)
        )
        scope = portable(request.scope)
        for left in reversed(range(TRIES if repeatable(request.method, path) else 1)):
            try:
                return await _answer(cast(Messages, handle.remote(scope, body)), path)
            except LOST as exc:
                logger.warning("%s %s: its replica was lost: %s", request.method, path, exc)
                if left:
                    continue
        form = error_body if path.startswith("/v1/") else native
        return problem_response(ReplicaLost(repeatable(request.method, path)), form)

    async def _metrics(self, scope: dict[str, Any]) -> Response:
        """What every replica shows, or the refusal of one: all of them know the same keys. A
        replica that is lost meanwhile has nothing to show."""
        asked = self._replicas.broadcast("answer", scope)
        found = await asked.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        answers = [answer for answer in found if not isinstance(answer, BaseException)]
        refused = [messages for _, messages in answers if messages[0]["status"] != 200]
        if refused or not answers:
            return _whole(refused[0]) if refused else problem_response(ReplicaLost(True), native)
        texts = {name: _whole(messages).body for name, messages in answers}
        text = merged({name: bytes(body).decode() for name, body in texts.items()})
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _whole(messages: list[Message]) -> Response:
    response = Response(b"".join(m.get("body", b"") for m in messages), messages[0]["status"])
    response.raw_headers = messages[0]["headers"]
    return response


async def _answer(messages: Messages, path: str) -> Response:
    """A response whose stream goes on; anything that is no stream is whole before it leaves, so
    that a loss half-way can still be tried again. Raises what is in `LOST`."""
    start = await anext(messages)
    headers = start["headers"]
    if (b"content-type", b"text/event-stream") in [(k, v.partition(b";")[0]) for k, v in headers]:
        first = await anext(messages)
        response: Response = StreamingResponse(_stream(first, messages, path), start["status"])
    else:
        response = Response(b"".join([m.get("body", b"") async for m in messages]), start["status"])
    response.raw_headers = headers
    return response


async def _stream(first: Message, messages: Messages, path: str) -> AsyncIterator[bytes]:
    yield first.get("body", b"")
    try:
        async for message in messages:
            yield message.get("body", b"")
    except LOST as exc:
        logger.warning("%s: its replica was lost in mid-stream: %s", path, exc)
        write = openai_error_event if path.startswith("/v1/") else error_event
        yield write(ReplicaLost(repeatable=True))
    finally:
        messages.cancel()  # type: ignore[no-untyped-call]
