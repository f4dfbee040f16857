"""One call as a value: what is sent, whether it may be repeated, how its answer is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from polyhead.clients.errors import UnreadableAnswerError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

OK = frozenset(range(200, 300))


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: httpx.Headers
    content: bytes


@dataclass(frozen=True)
class Call(Generic[T]):
    """What to send, and how to read what comes back.

    form: parts of a multipart form instead of a body, as file names and contents; a name of None
    is plain text. repeatable: sending it twice has the effect and the answer of sending it once.
    expected: the statuses whose answers `read` understands; others are errors.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    body: Mapping[str, Any] | None = None
    form: Mapping[str, tuple[str | None, bytes]] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    expected: frozenset[int] = OK


@dataclass(frozen=True)
class StreamCall(Generic[T]):
    """A call whose answer is a stream; `event` reads one of its events, by name and data."""

    call: Call[None]
    event: Callable[[str, bytes], T]


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list, and the call for the part after it."""

    items: list[T]
    following: "Call[Page[T]] | None"


def answer(model: type[M]) -> Callable[[Reply], M]:
    """A reader of bodies that hold `model`."""
    return lambda reply: parse(model, reply.content)


def nothing(_: Reply) -> None:
    """A reader of answers that say nothing but that it is done."""


def parse(model: type[M], data: bytes) -> M:
    """`data` as `model`. Raises `UnreadableAnswerError`."""
    try:
        return model.model_validate_json(data)
    except ValidationError as exc:
        raise UnreadableAnswerError(
            f"the server's answer is not a {model.__name__}: {exc.errors()[0]['msg']}"
        ) from exc
