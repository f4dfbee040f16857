"""Server-sent events: bytes in, answers out."""

import json
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import httpx

from polyhead.clients.errors import APIConnectionError, Problem, problem_error

E = TypeVar("E")

DONE = b"[DONE]"


class EventReader(Generic[E]):
    """Reads the events of one answer as its bytes come, each through `read(name, data)`.

    Works on bytes, because httpx's lines also end at characters that may stand inside of JSON, such
    as U+2028.
    """

    def __init__(self, read: Callable[[str, bytes], E], request_id: str | None = None) -> None:
        self._read = read
        self._request_id = request_id
        self._rest = b""
        self._name = ""
        self._done = False

    @classmethod
    def of(cls, response: httpx.Response, read: Callable[[str, bytes], E]) -> "EventReader[E]":
        return cls(read, response.headers.get("x-request-id"))

    def feed(self, data: bytes) -> Iterator[E]:
        """The events that `data` completes. Raises `APIStatusError` for an `error` event."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b": ")
            if name == b"event":
                self._name = value.decode()
            elif name == b"data" and value == DONE:
                self._done = True
            elif name == b"data":
                yield self._event(value)
                self._name = ""

    def close(self) -> None:
        """Raises `APIConnectionError` where the answer ended before its last event."""
        if not self._done:
            raise APIConnectionError("the stream was cut off before its end")

    def _event(self, data: bytes) -> E:
        if self._name == "error":
            problem = Problem.model_validate(json.loads(data))
            raise problem_error(problem, self._request_id, None)
        return self._read(self._name, data)
