"""Each limit on what a client sends: its status, its code, and that it costs next to nothing."""

import json
import resource
import struct
import subprocess
import sys
import time
from typing import Any

import pytest
from live_server import LiveServer

from polyhead.adapters.tensor_files import MAX_HEADER_BYTES
from polyhead.server.http.bodies import MAX_VALUES
from polyhead.server.http.schemas import MAX_MEMBERS, MAX_METADATA_BYTES, MAX_TEMPLATE

ASK: dict[str, Any] = {"task": "amber", "prompt": "x"}
HEADER = struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 64
EXAMPLE = {"input": "a", "output": "b"}
FORM = {"task": (None, '{"id": "new"}'), "routing": ("r", HEADER)}

# What is limited, the call, status, code and the field that the refusal names.
LIMITS = [
    ("body", "/generate", b" " * 200_001, 413, "body_too_large", None),
    ("nesting", "/generate", b'{"task":' + b"[" * 5000 + b"]" * 5000 + b"}", 400,
     "malformed_body", None),
    ("members", "/generate", {**ASK, **dict.fromkeys(map(str, range(MAX_MEMBERS)), 1)}, 422,
     "invalid_value", ""),
    ("mixture", "/generate", {"mixture": {f"t{i}": 1.0 for i in range(65)}, "prompt": "x"}, 422,
     "invalid_value", "mixture"),
    ("n", "/generate", {**ASK, "n": 17}, 422, "invalid_value", "n"),
    ("logprobs", "/generate", {**ASK, "logprobs": 21}, 422, "invalid_value", "logprobs"),
    ("stop strings", "/generate", {**ASK, "stop": ["x"] * 17}, 422, "invalid_value", "stop"),
    ("a stop string", "/generate", {**ASK, "stop": "x" * 257}, 422, "invalid_value", "stop"),
    ("tokens", "/generate", {**ASK, "max_tokens": 10_000}, 422, "invalid_value", "max_tokens"),
    ("prompt", "/generate", {**ASK, "prompt": "x" * 600}, 422, "invalid_value", "prompt"),
    ("deadline", "/generate", {**ASK, "deadline": 1e6}, 422, "invalid_value", "deadline"),
    ("choices", "/score", {**ASK, "choices": ["a"] * 257}, 422, "invalid_value", "choices"),
    ("examples", "/tasks", {"id": "new", "examples": [EXAMPLE] * 513}, 422, "invalid_value",
     "examples[512]"),
    ("an example", "/tasks", {"id": "new", "examples": [{"input": "x" * 5000, "output": "y"}]},
     422, "invalid_value", "examples[0]"),
    ("metadata", "/tasks",
     {"id": "new", "copy_of": "amber", "metadata": {"a": "x" * MAX_METADATA_BYTES}}, 422,
     "invalid_value", "metadata"),
    ("template", "/tasks",
     {"id": "new", "copy_of": "amber", "template": "{input}".ljust(MAX_TEMPLATE + 1)}, 422,
     "invalid_value", "template"),
    ("safetensors header", "/tasks", FORM, 422, "invalid_routing", "routing.safetensors"),
    ("prompts at once", "/v1/completions", {"model": "amber", "prompt": ["x"] * 257}, 422,
     None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "field"), [c[1:] for c in LIMITS], ids=[c[0] for c in LIMITS]
)
def test_each_limit(
    live: LiveServer, path: str, body: Any, status: int, code: str | None, field: str | None
) -> None:
    kind = {"Content-Type": "application/json"}
    if body is FORM:
        answer = live.client.post(path, files=body)
    elif isinstance(body, bytes):
        answer = live.client.post(path, content=body, headers=kind)
    else:
        answer = live.client.post(path, json=body)
    problem = answer.json()
    if code is None:  # OpenAI's form has neither code nor field of ours
        assert (400 <= answer.status_code < 500, "error" in problem) == (True, True)
        return
    assert (answer.status_code, problem["code"]) == (status, code), answer.text
    assert [error["field"] for error in problem.get("errors", [])][:1] == (
        [] if field is None else [field]
    )


@pytest.mark.parametrize("path", ["/tasks?prefx=a", "/jobs?limit=1&x=", "/tasks/amber?api_key=k"])
def test_an_unknown_parameter_is_refused(live: LiveServer, path: str) -> None:
    answer = live.client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert answer.json()["errors"][0]["message"] == "unknown parameter"


def test_a_parameter_is_given_once(live: LiveServer) -> None:
    answer = live.client.get("/tasks?prefix=a&prefix=b")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "query.prefix"
    assert live.client.get("/tasks?metadata=a:1&metadata=b:2").status_code == 200


def test_a_refusal_does_not_echo_all_that_was_sent(live: LiveServer) -> None:
    header = json.dumps({f"t{i}": 0 for i in range(10_000)}).encode()
    for data in (header, b'{"x": "' + b"y" * 100_000 + b'"}'):
        form = {**FORM, "routing": ("r", struct.pack("<Q", len(data)) + data)}
        answer = live.client.post("/tasks", files=form)
        assert answer.status_code == 422
        assert len(answer.content) < 10_000


def test_a_template_of_many_places_is_refused_before_it_is_filled(live: LiveServer) -> None:
    """9,000 places and an input of 150 kB would be a text of 1.3 GB."""
    places = {"id": "new", "copy_of": "amber", "template": "{input}" * 9000}
    assert live.client.post("/tasks", json=places).status_code == 201
    try:
        before, start = peak_mebibytes(), time.monotonic()
        answer = live.client.post("/generate", json={"task": "new", "input": "x" * 150_000})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["found"] == "1350000000 characters"
        assert peak_mebibytes() - before < 100
        assert time.monotonic() - start < 5
    finally:
        live.client.delete("/tasks/new")


def peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def test_too_many_values_are_refused_unparsed() -> None:
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found["refused"]) == {"BodyTooComplex", "InvalidValue", "ValidationError"}
    assert found["mebibytes"] < 200, found


BOMBS = f"""
import json, resource
from polyhead.server.http.bodies import parsed
from polyhead.server.http.schemas import GenerateBody, TaskBody
from polyhead.server.http.problems import problem_response
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
many = {MAX_VALUES}
bodies = [
    (TaskBody, b'{{"examples": [' + b'1,' * (8 * many) + b'1]}}'),
    (TaskBody, b'{{"routing": {{"logits": [' + b'[],' * (4 * many) + b'1]}}}}'),
    (TaskBody, b'{{"examples": [' + b'1,' * (many - 9) + b'1]}}'),
    (TaskBody, b'{{"metadata": {{' + b','.join(b'"%x":0' % i for i in range(many - 9)) + b'}}}}'),
    (GenerateBody, b'{{' + b','.join(b'"%x":1' % i for i in range(many - 9)) + b'}}'),
    (GenerateBody, b'{{"messages": [' + b'1,' * (many - 9) + b'1]}}'),
]
before, refused = peak(), []
for model, body in bodies:
    try:
        parsed(model, body)
    except Exception as exc:
        refused.append(type(exc).__name__)
        assert len(problem_response(exc).body) < 10_000
assert len(refused) == len(bodies)
print(json.dumps({{"refused": refused, "mebibytes": peak() - before}}))
"""
