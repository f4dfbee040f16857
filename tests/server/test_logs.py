"""Log lines: one JSON object each, with the running call's id and a record's fields."""

import json
import logging
from typing import Any

from polyhead.server.logs import Call, JsonLines, TextLines, current_call


def record(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("polyhead.x", logging.WARNING, "x.py", 1, message, (), None)
    if fields:
        made.fields = fields
    return made


def test_a_line_is_an_object_with_the_records_fields() -> None:
    line = JsonLines().format(record("two\nlines", task="amber", seconds=0.5))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "logger": "polyhead.x",
        "message": "two\nlines",
        "task": "amber",
        "seconds": 0.5,
    }


def test_within_a_call_a_line_has_its_id() -> None:
    token = current_call.set(Call("client-1", "own-1"))
    try:
        assert json.loads(JsonLines().format(record("x")))["request_id"] == "client-1"
        assert 'request_id="client-1"' in TextLines().format(record("x"))
    finally:
        current_call.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(record("x")))


def test_what_json_cannot_say_is_text() -> None:
    assert json.loads(JsonLines().format(record("x", where={1, 2})))["where"] == "{1, 2}"
