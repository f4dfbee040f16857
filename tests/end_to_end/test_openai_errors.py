"""Refusals below `/v1`: OpenAI's form, and the classes that its Python client raises."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import LiveServer
from openai_clients import async_client, sync_client

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with sync_client(live.url) as made:
        yield made


def test_an_unknown_model_is_not_found(client: openai.OpenAI, live: LiveServer) -> None:
    calls = [
        lambda: client.completions.create(model="ambre", prompt="x"),
        lambda: client.chat.completions.create(model="ambre", messages=HI),
        lambda: client.chat.completions.create(model="ambre", messages=HI, stream=True),
        lambda: client.models.retrieve("ambre"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "invalid_request_error"
        assert "ambre" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        calls[0]()
    assert caught.value.param == "model"
    assert caught.value.request_id

    async def ask() -> None:
        async with async_client(live.url) as made:
            await made.chat.completions.create(model="ambre", messages=HI)

    with pytest.raises(openai.NotFoundError):
        asyncio.run(ask())


COMPLETION = {"model": "amber", "prompt": "hello"}
CHAT = {"model": "amber", "messages": HI}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**COMPLETION, "temprature": 1}, "temprature"),
        ({**COMPLETION, "best_of": 2}, "best_of"),
        ({**COMPLETION, "temperature": "hot"}, "temperature"),
        ({**COMPLETION, "presence_penalty": 3}, "presence_penalty"),
        ({**COMPLETION, "n": 0}, "n"),
        ({**COMPLETION, "n": 1000}, "n"),
        ({**COMPLETION, "logprobs": 1000}, "logprobs"),
        ({**COMPLETION, "max_tokens": 0}, "max_tokens"),
        ({**COMPLETION, "max_tokens": 100_000}, "max_tokens"),
        ({**COMPLETION, "stop": [""]}, "stop[0]"),
        ({**COMPLETION, "prompt": []}, "prompt"),
        ({**COMPLETION, "prompt": [["a"]]}, "prompt[0][0]"),
        ({**COMPLETION, "prompt": ["fine", ""]}, "prompt[1]"),
        ({**COMPLETION, "prompt": [[1], [2, 257]]}, "prompt[1][1]"),
        ({**COMPLETION, "prompt": [1, 257]}, "prompt[1]"),
        ({**COMPLETION, "prompt": ["x"] * 1000}, "prompt"),
        ({**COMPLETION, "stream_options": {"include_usage": True}}, "stream_options"),
        ({**COMPLETION, "task": "birch"}, "task"),
        ({"prompt": "hello"}, "model"),
        ({**COMPLETION, "model": "no/such"}, "model"),
        ({**CHAT, "messages": []}, "messages"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({**CHAT, "messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({**CHAT, "max_completion_tokens": 100_000}, "max_completion_tokens"),
        ({**CHAT, "max_tokens": 100_000}, "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_value_is_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    path = "/chat/completions" if "messages" in body else "/completions"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.post(path, body=body, cast_to=object)
    error: Any = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"


def test_a_null_is_as_good_as_nothing(client: openai.OpenAI) -> None:
    nothing = dict.fromkeys(["stop", "n", "temperature", "seed", "stream_options", "max_tokens"])
    found: Any = client.post("/completions", body={**COMPLETION, **nothing}, cast_to=object)
    assert found["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("path", "status", "code", "request_of"),
    [
        ("/v1/completions", 400, "malformed_body", {"content": b"{"}),
        ("/v1/completions", 415, "unsupported_content", {"content": b"x"}),
        ("/v1/completions", 413, "body_too_large", {"json": {"prompt": "x" * 250_000}}),
        ("/v1/engines", 404, "not_found", {"json": {}}),
        ("/v1/models", 405, "method_not_allowed", {"json": {}}),
    ],
)
def test_whatever_is_refused_below_v1_has_openai_s_form(
    live: LiveServer, path: str, status: int, code: str, request_of: dict[str, Any]
) -> None:
    headers = {} if code == "unsupported_content" else {"Content-Type": "application/json"}
    answer = live.client.post(path, headers=headers, **request_of)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    outside = live.client.post("/generate", headers=headers, **request_of)
    assert outside.headers["content-type"] == "application/problem+json"
