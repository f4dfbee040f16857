"""Reading a call's body: type, size, JSON and schema, with the slow parts off the event loop."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from polyhead.server.http.errors import BodyTooComplex
from polyhead.server.http.limits import JSON, content_type

B = TypeVar("B", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")

POOL_THREADS = 4
"""Threads for parsing, tokenising and the registry. More would only share the interpreter lock
with the engine and the event loop, and make both wait longer for it."""


STRUCTURE = (b",", b"[", b"{")
MAX_VALUES = 1 << 20
"""Values in a body, guessed from above by the bytes that separate them. A value of two bytes takes
a hundred once it is parsed, and parsing holds the interpreter's lock."""


SMALL_BODY = 8192
"""Bytes that are parsed at once, in some 0.1 ms: less than a thread takes to get its turn."""


class Pool:
    """Runs what can be slow in a few threads, off the event loop. Built on that loop."""

    def __init__(self) -> None:
        self._limiter = CapacityLimiter(POOL_THREADS)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work(*args, **kwargs)`, or what it raises."""
        return await anyio.to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._limiter)


def parsed(model: type[B], data: bytes) -> B:
    """`data` as `model`. May be slow: call it in a thread.

    Raises `BodyTooComplex`, `pydantic.ValidationError` or `InvalidValue`.
    """
    values = sum(map(data.count, STRUCTURE))
    if values > MAX_VALUES:
        raise BodyTooComplex(values, MAX_VALUES)
    return model.model_validate_json(data)


def json_body(model: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency that reads the body as `model`.

    Raises `UnsupportedContent`, `BodyTooLarge`, `BodyTooComplex`, `pydantic.ValidationError` or
    `InvalidValue`.
    """

    async def read(request: Request) -> B:
        content_type(request, JSON)
        data = await request.body()
        if len(data) <= SMALL_BODY:
            return parsed(model, data)
        pool: Pool = request.app.state.service.pool
        return await pool.run(parsed, model, data)

    return read


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a call whose body is read by `json_body(model)`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


def document(app: FastAPI, *models: type[BaseModel]) -> None:
    """Add the schemas that `takes` refers to to the app's OpenAPI description."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            pairs: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in models]
            _, schemas = models_json_schema(pairs, ref_template="#/components/schemas/{model}")
            described.setdefault("components", {}).setdefault("schemas", {}).update(
                schemas["$defs"]
            )
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
