"""Streams of `/v1`, read by OpenAI's own Python client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import LiveServer
from openai_clients import async_client, sync_client

HI: list[Any] = [{"role": "user", "content": "hi"}]
ENDLESS = {"ignore_eos": True}
WITH_USAGE: Any = {"include_usage": True}
GREEDY: dict[str, Any] = {"model": "amber", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with sync_client(live.url) as made:
        yield made


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    if chunks[0].object == "text_completion":
        return "".join(choice.text for choice in choices)
    return "".join(choice.delta.content or "" for choice in choices)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 3, "temperature": 1, "seed": 3},
        {"stop": ["9"]},
        {"prompt": ["one", "two"], "n": 2},
    ],
)
def test_a_streamed_completion_adds_up(client: openai.OpenAI, more: dict[str, Any]) -> None:
    body = {"prompt": "hello", **GREEDY, **more}
    whole = client.completions.create(extra_body=ENDLESS, **body)
    chunks = list(
        client.completions.create(
            extra_body=ENDLESS, stream=True, stream_options=WITH_USAGE, **body
        )
    )
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.text
        ends = [c.finish_reason for k in chunks for c in k.choices if c.index == choice.index]
        assert ends[-1] == choice.finish_reason
        assert set(ends[:-1]) <= {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id != whole.id


def test_a_streamed_chat_adds_up(client: openai.OpenAI) -> None:
    body = {**GREEDY, "messages": HI, "n": 2}
    whole = client.chat.completions.create(extra_body=ENDLESS, **body)
    chunks = list(client.chat.completions.create(extra_body=ENDLESS, stream=True, **body))
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.message.content
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [part.delta.role for part in own] == ["assistant", *[None] * (len(own) - 1)]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


def test_the_client_s_own_helper_gathers_a_chat(client: openai.OpenAI) -> None:
    body = {**GREEDY, "messages": HI, "max_tokens": 12}
    whole = client.chat.completions.create(extra_body=ENDLESS, **body)
    with client.chat.completions.stream(
        extra_body=ENDLESS, stream_options=WITH_USAGE, **body
    ) as stream:
        for _ in stream:
            pass
        # The helper raises on an answer that was cut short, unless it is asked for one.
        gathered = stream.current_completion_snapshot
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.choices[0].finish_reason == "length"
    assert gathered.usage == whole.usage


def test_streamed_logprobs_add_up(client: openai.OpenAI) -> None:
    body = {**GREEDY, "prompt": "hello", "logprobs": 2, "echo": True}
    whole = client.completions.create(extra_body=ENDLESS, **body).choices[0].logprobs
    assert whole is not None
    chunks = client.completions.create(extra_body=ENDLESS, stream=True, **body)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert len(parts) > 1
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for part in parts if part for value in getattr(part, name)]
        assert streamed == getattr(whole, name)


def test_usage_can_come_with_every_chunk(live: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**GREEDY, **ENDLESS, "prompt": "hello", "stream": True, "stream_options": options}
    lines = live.client.post("/v1/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 24


def test_the_async_client_streams(client: openai.OpenAI, live: LiveServer) -> None:
    async def read() -> str:
        async with async_client(live.url) as made:
            stream = await made.chat.completions.create(
                messages=HI, stream=True, extra_body=ENDLESS, **GREEDY
            )
            return text_of([chunk async for chunk in stream])

    whole = client.chat.completions.create(messages=HI, extra_body=ENDLESS, **GREEDY)
    assert asyncio.run(read()) == whole.choices[0].message.content


def test_leaving_a_stream_ends_every_request_behind_it(
    client: openai.OpenAI, live: LiveServer
) -> None:
    body: dict[str, Any] = {**GREEDY, "prompt": ["a", "b", "c"], "max_tokens": 400}
    stream = client.completions.create(extra_body=ENDLESS, stream=True, **body)
    next(iter(stream))
    assert live.running() >= 3
    stream.close()
    live.eventually(lambda: live.running() == 0)
    assert live.service.bridge.waiting == 0
