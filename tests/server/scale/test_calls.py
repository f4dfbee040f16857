"""What a gateway reads off a call."""

import json

import pytest
from starlette.requests import Request
from starlette.types import Message

from polyhead.server.scale.calls import READ_BYTES, read_body, repeatable, task_of


@pytest.mark.parametrize(
    ("path", "body", "task"),
    [
        ("/generate", {"task": "amber", "prompt": "x"}, "amber"),
        ("/score", {"task": "birch", "choices": []}, "birch"),
        ("/v1/chat/completions", {"model": "amber"}, "amber"),
        ("/generate", {"mixture": {"amber": 1}}, ""),
        ("/generate", {"task": 7}, ""),
        ("/generate", ["task"], ""),
        ("/tasks", {"task": "amber"}, ""),
    ],
)
def test_the_task_is_read_where_it_matters(path: str, body: object, task: str) -> None:
    assert task_of(path, json.dumps(body).encode()) == task


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_cannot_be_read_is_the_replicas_to_refuse(body: bytes) -> None:
    assert task_of("/generate", body) == ""


def test_a_large_body_is_not_parsed() -> None:
    body = json.dumps({"task": "amber", "prompt": "x" * READ_BYTES}).encode()
    assert task_of("/generate", body) == ""


def test_only_what_changes_nothing_is_sent_twice() -> None:
    assert repeatable("POST", "/generate")
    assert repeatable("GET", "/tasks")
    assert not repeatable("POST", "/tasks")
    assert not repeatable("PUT", "/tasks/amber")
    assert not repeatable("DELETE", "/tasks/amber")


async def read(parts: list[bytes], most: int) -> bytes:
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": True} for part in parts
    ]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    queue = iter(messages)

    async def receive() -> Message:
        return next(queue)

    return await read_body(Request({"type": "http"}, receive), most)


@pytest.mark.anyio
async def test_a_body_over_the_limit_is_one_byte_too_long() -> None:
    assert await read([b"ab", b"cd"], 4) == b"abcd"
    assert await read([b"ab", b"cd", b"ef"], 4) == b"abcde"
    assert await read([b"x" * 100], 4) == b"xxxxx"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
