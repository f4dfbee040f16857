"""`response_format`, through OpenAI's Python client and through `/generate`."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from live_server import LiveServer
from openai_clients import sync_client
from pydantic import BaseModel, ConfigDict, Field

HI: list[Any] = [{"role": "user", "content": "hi"}]
OBJECT: Any = {"type": "json_object"}


class Place(BaseModel):
    """What the client's helper turns into a strict schema and back."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["town", "river"]
    size: int = Field(ge=0, le=9)
    tags: list[Literal["a", "b"]] = Field(max_length=3)


SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "place", "strict": True, "schema": Place.model_json_schema()},
}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with sync_client(live.url) as made:
        yield made


def test_the_client_parses_what_it_gets(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="amber", messages=HI, response_format=Place, n=4, seed=1, max_tokens=100
    )
    places = [choice.message.parsed for choice in found.choices]
    assert all(isinstance(place, Place) for place in places)
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    assert len({str(place) for place in places}) > 1


def test_without_the_format_the_same_request_gives_no_json(client: openai.OpenAI) -> None:
    body: Any = {"model": "amber", "messages": HI, "seed": 1, "max_tokens": 100}
    for free in ({}, {"response_format": {"type": "text"}}):
        text = client.chat.completions.create(**body, **free).choices[0].message.content or ""
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(text)
    held = client.chat.completions.create(**body, response_format=SCHEMA)
    Place.model_validate_json(held.choices[0].message.content or "")


def test_a_stream_is_held_to_it_too(client: openai.OpenAI) -> None:
    body: Any = {"model": "birch", "messages": HI, "seed": 2, "max_tokens": 100}
    whole = client.chat.completions.create(**body, response_format=SCHEMA)
    chunks = client.chat.completions.create(**body, response_format=SCHEMA, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    Place.model_validate_json(text)


def test_any_object_begins_as_one(client: openai.OpenAI) -> None:
    body: Any = {"model": "amber", "messages": HI, "seed": 3, "max_tokens": 200, "n": 4}
    found = client.chat.completions.create(**body, response_format=OBJECT)
    for choice in found.choices:
        text = choice.message.content or ""
        assert text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_completions_and_generate_take_it_as_well(client: openai.OpenAI, live: LiveServer) -> None:
    body: Any = {"prompt": "hello", "max_tokens": 100, "temperature": 0}
    found = client.completions.create(model="amber", extra_body={"response_format": SCHEMA}, **body)
    native = live.generate(**body, ignore_eos=False, response_format=SCHEMA)
    assert found.choices[0].text == native["choices"][0]["text"]
    Place.model_validate_json(found.choices[0].text)


def schema_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({**OBJECT, "json_schema": SCHEMA["json_schema"]}, "response_format.json_schema"),
        (schema_of("x"), "response_format.json_schema.schema"),
        (schema_of({"type": "objekt"}), "response_format.json_schema.schema"),
        (schema_of({"multipleOf": 1_234_567}), "response_format.json_schema.schema"),
        (schema_of({"type": "string", "pattern": "^([c-z](a{1000}){1000})$"}), "response_format"),
    ],
)
def test_a_bad_format_is_named(
    client: openai.OpenAI, live: LiveServer, response_format: Any, param: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="amber", messages=HI, response_format=response_format)
    assert caught.value.param == param
    body = {"task": "amber", "prompt": "x", "response_format": response_format}
    answer = live.client.post("/generate", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == param


def test_an_end_that_is_ignored_does_not_go_with_a_format(live: LiveServer) -> None:
    body = {"task": "amber", "prompt": "x", "response_format": OBJECT, "ignore_eos": True}
    answer = live.client.post("/generate", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "ignore_eos"
