"""Answers held to JSON: what is allowed, what is refused, and that nothing else changes."""

import json
import time
from typing import Any

import numpy as np
import pytest
from factories import Collector, byte_tokenizer, make_engine
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection
from polyhead.server.engine.constraint import TOKEN_SECONDS, BadSchema, Grammar, Grammars
from polyhead.server.engine.request import Failure, Output, Request, SamplingParams
from polyhead.server.engine.tokenizer import Tokenizer

POINT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 20},
        "up": {"type": "boolean"},
    },
    "required": ["x", "name", "up"],
    "additionalProperties": False,
}
HARD = {"type": "string", "pattern": "^(a{1000}){1000}$"}  # to prepare
SLOW = {"type": "string", "pattern": "^(b|[c-z](a{1000}){1000})$"}  # once it has begun
END = 256


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer(byte_tokenizer(), [END]))


def ask(name: str, grammar: Grammar | None, **changes: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": 120, "temperature": 1.0, "seed": 4, **changes}
    return Request(
        name, "t", "g", tuple(b"answer: "), params=SamplingParams(**values, grammar=grammar)
    )


def fits(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(POINT["required"])


def follow(grammar: Grammar, text: str) -> set[int]:
    """The tokens allowed after `text`, taken token by token."""
    cursor = grammar.cursor()
    for token in text.encode():
        assert cursor.allowed(text.encode()[: len(cursor._taken)])[token]
        cursor.take(token)
    return set(np.flatnonzero(cursor.allowed(list(text.encode()))).tolist())


def test_the_next_tokens_are_those_of_the_schema(grammars: Grammars) -> None:
    grammar = grammars.of_schema(POINT)
    assert follow(grammar, "") == {ord("{")}
    assert follow(grammar, '{"x": ') == set(b"0123456789")
    assert follow(grammar, '{"x": 9') == {*b"0123456789,"}
    assert follow(grammar, '{"x": 99') == {ord(",")}
    assert follow(grammar, '{"x": 99, "name": "", "up": ') == set(b"tf")
    assert follow(grammar, '{"x": 99, "name": "", "up": true}') == {END}


def test_a_lost_place_is_found_again_from_the_answer(grammars: Grammars) -> None:
    grammar = grammars.of_schema(POINT)
    answer = list(b'{"x": 7, "na')
    cursor = grammar.cursor()
    cursor.take(ord("{"))
    rebuilt = cursor.allowed(answer)
    assert set(np.flatnonzero(rebuilt).tolist()) == follow(grammar, bytes(answer).decode())
    cursor.take(ord("m"))
    assert set(np.flatnonzero(cursor.allowed([*answer, ord("m")])).tolist()) == {ord("e")}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_choice_fits_and_without_the_grammar_none_does(
    model: PreTrainedModel, injection: Injection, grammars: Grammars, temperature: float
) -> None:
    collector = Collector()
    engine = make_engine(model, injection, collector)
    held = ask("held", grammars.of_schema(POINT), n=4, temperature=temperature)
    free = ask("free", None, n=4, temperature=temperature)
    engine.start()
    try:
        for request in (held, free):
            engine.submit(request)
        assert all(fits(collector.text(held, i)) for i in range(4))
        assert not any(fits(collector.text(free, i)) for i in range(4))
        texts = {collector.text(held, i) for i in range(4)}
        assert len(texts) == (4 if temperature else 1)
        again = ask("again", grammars.of_schema(POINT), n=4, temperature=temperature)
        alone = ask("alone", None, n=4, temperature=temperature)
        engine.submit(again)
        engine.submit(alone)
        assert [collector.text(again, i) for i in range(4)] == [
            collector.text(held, i) for i in range(4)
        ]
        assert [collector.text(alone, i) for i in range(4)] == [
            collector.text(free, i) for i in range(4)
        ]
    finally:
        engine.stop()


def test_preemption_changes_no_answer(
    model: PreTrainedModel, injection: Injection, grammars: Grammars
) -> None:
    """A cache for one answer only: the others are preempted again and again."""
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60}
    answers = []
    for kv_tokens in (4096, 512):
        collector = Collector()
        engine = make_engine(model, injection, collector, kv_tokens=kv_tokens, longest=512)
        requests = [
            ask(f"{kv_tokens}-{i}", grammars.of_schema(schema), seed=i, max_tokens=300)
            for i in range(3)
        ]
        engine.start()
        try:
            for request in requests:
                engine.submit(request)
            answers.append([collector.text(request) for request in requests])
            preempted = engine.stats().preemptions > 0
        finally:
            engine.stop()
        assert preempted == (kv_tokens == 512)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3


def test_a_grammar_that_is_too_slow_fails_alone(
    model: PreTrainedModel, injection: Injection, grammars: Grammars
) -> None:
    collector = Collector()
    engine = make_engine(model, injection, collector)
    slow, good = ask("slow", grammars.of_schema(SLOW)), ask("good", grammars.of_schema(POINT))
    engine.start()
    try:
        engine.submit(slow)
        engine.submit(good)
        (failure,) = [e for e in collector.wait(slow) if isinstance(e, Failure)]
        assert failure.stray
        assert fits("".join(e.text for e in collector.wait(good) if isinstance(e, Output)))
        assert engine.stats().failed_steps == 0
    finally:
        engine.stop()


def test_a_step_waits_no_longer_than_it_may(grammars: Grammars) -> None:
    cursor = grammars.of_schema(SLOW).cursor()
    for token in b'"c':
        cursor.take(token)
        began = time.monotonic()
        mask = cursor.allowed(list(b'"c')[: 1 + (token == ord("c"))])
    assert time.monotonic() - began < TOKEN_SECONDS + 0.5
    assert cursor.failed
    assert mask.all()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "not fetch"),
        ({"$ref": "file:///etc/passwd"}, "not fetch"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"enum": ["x" * 70_000]}, "bytes"),
        ({"type": "integer", "multipleOf": 1_234_567}, "multipleOf"),
        ({"allOf": [{"multipleOf": n} for n in (97, 89, 83)]}, "multipleOf"),
        ({"type": "number", "minimum": float("inf")}, "JSON"),
        ({"allOf": [{"properties": {f"p{i}": {}}} for i in range(300)]}, "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_schema_that_cannot_be_held_to_is_refused_soon(
    grammars: Grammars, schema: dict[str, Any], reason: str
) -> None:
    began = time.monotonic()
    with pytest.raises(BadSchema, match=reason) as caught:
        grammars.of_schema(schema)
    assert time.monotonic() - began < 3
    assert len(str(caught.value)) < 300


def test_a_deep_schema_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(BadSchema):
        grammars.of_schema(schema)


def test_a_schema_may_not_take_long_to_prepare() -> None:
    hurried = Grammars(Tokenizer(byte_tokenizer(), [END]), compile_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(BadSchema, match=r"takes longer than 0\.2 s"):
        hurried.of_schema(HARD)
    assert time.monotonic() - began < 1
    assert follow(hurried.of_schema(POINT), "") == {ord("{")}  # others do not wait for it
