"""A wrong input is refused by name, and costs nobody else anything."""

import base64
import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from live_server import CONTEXT, LiveServer
from safetensors.torch import save

SHAPE = [14, 4, 4]  # modules, heads, skills of the tiny backbone


def nested(value: float = 0.0, shape: list[int] = SHAPE) -> Any:
    """Nested lists of `shape`."""
    return torch.full(shape, value).tolist()


def with_entry(values: Any, entry: Any) -> Any:
    """`values` with its entry [1][2][3] replaced."""
    values[1][2][3] = entry
    return values


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


FILE = save({"logits": torch.zeros(SHAPE)})
TERABYTES = struct.pack("<Q", 2**42) + FILE[8:]
HUGE_TENSOR = json.dumps(
    {"logits": {"dtype": "F32", "shape": [2**40, 4, 4], "data_offsets": [0, 2**46]}}
).encode()
HUGE = struct.pack("<Q", len(HUGE_TENSOR)) + HUGE_TENSOR + b"\0" * 64
MODULE = "model.layers.0.self_attn.q_proj"


def private(a: list[int], b: list[int], name: str = MODULE) -> Any:
    tensors = {f"{name}.A": torch.zeros(a), f"{name}.B": torch.zeros(b)}
    return {"private_adapter": {"safetensors": encoded(save(tensors))}}


NEIGHBOUR = {"task": "birch", "prompt": "neighbour", "max_tokens": 32, "ignore_eos": True}


@pytest.fixture(scope="module")
def undisturbed(live: LiveServer) -> Any:
    """What the neighbour is answered when nothing else goes on."""
    return live.generate(**NEIGHBOUR)["choices"]


@pytest.fixture
def unharmed(live: LiveServer, undisturbed: Any) -> Iterator[None]:
    """A neighbour that decodes all the while gets its answer, and the tasks stay as they are."""
    tasks = live.client.get("/tasks").json()
    answers: list[Any] = []

    def neighbour() -> None:
        with httpx.Client(base_url=live.url, timeout=60, trust_env=False) as client:
            answers.append(client.post("/generate", json=NEIGHBOUR).json()["choices"])

    thread = threading.Thread(target=neighbour)
    thread.start()
    live.eventually(lambda: live.running() > 0 or bool(answers))
    yield
    thread.join()
    assert answers == [undisturbed]
    assert live.client.get("/tasks").json() == tasks
    live.eventually(lambda: live.running() == 0)


def check(answer: httpx.Response, status: int, code: str, field: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    problem: dict[str, Any] = answer.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert all(problem[member] for member in ("type", "title", "detail"))
    fields = [error["field"] for error in problem.get("errors", [])]
    assert fields[:1] == ([] if field is None else [field])
    for error in problem.get("errors", []):
        # Of a broken file the message says what is there and what should be.
        assert error["found"] or error["expected"] or "safetensors" in error["message"]
    return problem


GENERATE = [
    ("unknown task", {"task": "nobody"}, 404, "unknown_task", "task"),
    ("id with a slash", {"task": "a/b"}, 422, "invalid_value", "task"),
    ("id with dots", {"task": "../amber"}, 422, "invalid_value", "task"),
    ("empty prompt", {"prompt": ""}, 422, "invalid_value", "prompt"),
    ("no token ids", {"prompt": []}, 422, "invalid_value", "prompt"),
    ("prompt too long", {"prompt": "x" * CONTEXT}, 422, "invalid_value", "prompt"),
    ("prompt far too long", {"prompt": "x" * 100_000}, 422, "invalid_value", "prompt"),
    ("ids too long", {"prompt": [1] * CONTEXT}, 422, "invalid_value", "prompt"),
    ("no room", {"max_tokens": CONTEXT - 4}, 422, "invalid_value", "max_tokens"),
    ("max_tokens 0", {"max_tokens": 0}, 422, "invalid_value", "max_tokens"),
    ("temperature -1", {"temperature": -1}, 422, "invalid_value", "temperature"),
    ("temperature hot", {"temperature": "hot"}, 422, "invalid_value", "temperature"),
    ("top_p 0", {"top_p": 0}, 422, "invalid_value", "top_p"),
    ("top_k -1", {"top_k": -1}, 422, "invalid_value", "top_k"),
    ("n over the limit", {"n": 17}, 422, "invalid_value", "n"),
    ("n far over the limit", {"n": 10**12}, 422, "invalid_value", "n"),
    ("logprobs over the limit", {"logprobs": 21}, 422, "invalid_value", "logprobs"),
    ("too many stops", {"stop": ["x"] * 17}, 422, "invalid_value", "stop"),
    ("a long stop", {"stop": ["a", "x" * 257]}, 422, "invalid_value", "stop[1]"),
    ("an empty stop", {"stop": ""}, 422, "invalid_value", "stop"),
    ("seed -1", {"seed": -1}, 422, "invalid_value", "seed"),
    ("deadline over the limit", {"deadline": 3601}, 422, "invalid_value", "deadline"),
    ("priority -101", {"priority": -101}, 422, "invalid_value", "priority"),
    ("id over the vocabulary", {"prompt": [1, 257]}, 422, "invalid_value", "prompt[1]"),
    ("id far over it", {"prompt": [10**30]}, 422, "invalid_value", "prompt[0]"),
    ("negative id", {"prompt": [1, 2, -1]}, 422, "invalid_value", "prompt[2]"),
    ("id as text", {"prompt": [1, "2"]}, 422, "invalid_value", "prompt[1]"),
    ("prompt and input", {"input": "x"}, 422, "invalid_value", "input"),
    ("a role of its own", {"messages": [{"role": "x", "content": "y"}], "prompt": None},
     422, "invalid_value", "messages[0].role"),
    ("no messages", {"messages": [], "prompt": None}, 422, "invalid_value", "messages"),
    ("unknown field", {"temprature": 1}, 422, "invalid_value", "temprature"),
    ("task and mixture", {"mixture": {"amber": 1}}, 422, "invalid_value", "mixture"),
    ("nobody answers", {"task": None}, 422, "invalid_value", "task"),
    ("mixture of nobody", {"task": None, "mixture": {"amber": 1, "nobody": 1}},
     404, "unknown_task", "mixture.nobody"),
    ("negative share", {"task": None, "mixture": {"amber": 1, "birch": -1}},
     422, "invalid_value", "mixture.birch"),
    ("share of nothing", {"task": None, "mixture": {"amber": 0}},
     422, "invalid_value", "mixture.amber"),
    ("mixture of the backbone", {"task": None, "mixture": {"amber": 1, "base": 1}},
     422, "invalid_value", "mixture.base"),
    ("empty mixture", {"task": None, "mixture": {}}, 422, "invalid_value", "mixture"),
    ("inline routing of a wrong shape", {"task": None, "routing": {"logits": nested(0, [3, 4, 4])}},
     422, "invalid_routing", "routing.logits"),
    ("inline routing in two forms",
     {"task": None, "routing": {"logits": nested(), "weights": nested(0.25)}},
     422, "invalid_value", "routing.weights"),
]  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("body", "status", "code", "field"), [c[1:] for c in GENERATE], ids=[c[0] for c in GENERATE]
)
def test_generate_refuses(live: LiveServer, body: Any, status: int, code: str, field: str) -> None:
    whole = {"task": "amber", "prompt": "hello"} | body
    check(live.client.post("/generate", json=whole), status, code, field)


@pytest.mark.parametrize("body", [{"task": "nobody"}, {"n": 17}, {"top_p": 2}])
def test_a_stream_is_refused_before_it_begins(live: LiveServer, body: Any) -> None:
    whole = {"task": "amber", "prompt": "hello"} | body
    plain, stream = (
        live.client.post("/generate", json={**whole, "stream": stream}) for stream in (False, True)
    )
    assert (stream.status_code, stream.json()) == (plain.status_code, plain.json())
    assert stream.headers["content-type"] == "application/problem+json"


SCORE = [
    ("no choices", {"choices": []}, "choices"),
    ("an empty choice", {"choices": ["a", ""]}, "choices[1]"),
    ("too many", {"choices": ["a"] * 257}, "choices"),
    ("a choice over the context", {"choices": ["a", "x" * CONTEXT]}, "choices[1]"),
    ("an id over the vocabulary", {"choices": [[1], [1, 257]]}, "choices[1][1]"),
    ("sampling", {"choices": ["a"], "temperature": 1.0}, "temperature"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("body", "field"), [c[1:] for c in SCORE], ids=[c[0] for c in SCORE])
def test_score_refuses(live: LiveServer, body: Any, field: str) -> None:
    whole = {"task": "amber", "prompt": "hello"} | body
    check(live.client.post("/score", json=whole), 422, "invalid_value", field)


REGISTER = [
    ("wrong shape", {"routing": {"logits": nested(0, [14, 4, 5])}},
     422, "invalid_routing", "routing.logits"),
    ("ragged", {"routing": {"logits": [[1.0], [1.0, 2.0]]}},
     422, "invalid_routing", "routing.logits"),
    ("text among numbers", {"routing": {"logits": with_entry(nested(), "x")}},
     422, "invalid_routing", "routing.logits"),
    ("negative weight", {"routing": {"weights": with_entry(nested(0.25), -0.25)}},
     422, "invalid_routing", "routing.weights[1][2][3]"),
    ("rows over 1", {"routing": {"weights": with_entry(nested(0.25), 0.5)}},
     422, "invalid_routing", "routing.weights[1][2]"),
    ("wrong granularity", {"routing": {"logits": nested(), "granularity": "model"}},
     422, "invalid_routing", "routing.logits"),
    ("unknown granularity", {"routing": {"logits": nested(), "granularity": "layer"}},
     422, "invalid_value", "routing.granularity"),
    ("nested deeply", {"routing": {"logits": json.loads("[" * 150 + "]" * 150)}},
     422, "invalid_routing", "routing.logits"),
    ("truncated file", {"routing": {"safetensors": encoded(FILE[:-8])}},
     422, "invalid_routing", "routing.safetensors"),
    ("header of terabytes", {"routing": {"safetensors": encoded(TERABYTES)}},
     422, "invalid_routing", "routing.safetensors"),
    ("tensor of terabytes", {"routing": {"safetensors": encoded(HUGE)}},
     422, "invalid_routing", "routing.safetensors"),
    ("empty file", {"routing": {"safetensors": ""}},
     422, "invalid_routing", "routing.safetensors"),
    ("not base64", {"routing": {"safetensors": "§§"}},
     422, "invalid_value", "routing.safetensors"),
    ("another tensor", {"routing": {"safetensors": encoded(save({"x": torch.zeros(SHAPE)}))}},
     422, "invalid_routing", "routing.safetensors"),
    ("no routing form", {"routing": {}}, 422, "invalid_value", "routing.logits"),
    ("nothing", {}, 422, "invalid_value", "routing"),
    ("two sources", {"copy_of": "amber", "routing": {"logits": nested()}},
     422, "invalid_value", "copy_of"),
    ("copy of nobody", {"copy_of": "nobody"}, 404, "unknown_task", "copy_of"),
    ("id with a slash", {"id": "a/b", "copy_of": "amber"}, 422, "invalid_value", "id"),
    ("id with dots", {"id": "..", "copy_of": "amber"}, 422, "invalid_value", "id"),
    ("id with a line end", {"id": "a\n", "copy_of": "amber"}, 422, "invalid_value", "id"),
    ("no id", {"id": None, "copy_of": "amber"}, 422, "invalid_value", "id"),
    ("the backbone's id", {"id": "base", "copy_of": "amber"}, 422, "reserved_id", "id"),
    ("a taken id", {"id": "amber", "copy_of": "birch"}, 409, "task_exists", None),
    ("template without input", {"copy_of": "amber", "template": "x"},
     422, "invalid_value", "template"),
    ("defaults over the limit", {"copy_of": "amber", "defaults": {"n": 17}},
     422, "invalid_value", "defaults.n"),
    ("unknown default", {"copy_of": "amber", "defaults": {"stream": True}},
     422, "invalid_value", "defaults.stream"),
    ("nested metadata", {"copy_of": "amber", "metadata": {"a": {"b": 1}}},
     422, "invalid_value", "metadata.a"),
    ("large metadata", {"copy_of": "amber", "metadata": {"a": "x" * 66_000}},
     422, "invalid_value", "metadata"),
    ("fit of a copy", {"copy_of": "amber", "fit": {"method": "z"}}, 422, "invalid_value", "fit"),
    ("private of a wrong shape", private([64, 2], [2, 63]),
     422, "invalid_private_adapter", f"private_adapter.{MODULE}"),
    ("private for no module", private([64, 2], [2, 64], "lm_head"),
     422, "invalid_private_adapter", "private_adapter"),
    ("private without numbers", {"private_adapter": {"safetensors": encoded(FILE[:20])}},
     422, "invalid_private_adapter", "private_adapter.safetensors"),
]  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("body", "status", "code", "field"), [c[1:] for c in REGISTER], ids=[c[0] for c in REGISTER]
)
def test_register_refuses(
    live: LiveServer, body: Any, status: int, code: str, field: str | None
) -> None:
    answer = live.client.post("/tasks", json={"id": "new"} | body)
    check(answer, status, code, field)


def test_a_wrong_shape_says_the_shape_wanted(live: LiveServer) -> None:
    body = {"id": "new", "routing": {"logits": nested(0, [14, 4, 5])}}
    (error,) = live.client.post("/tasks", json=body).json()["errors"]
    assert (error["found"], error["expected"]) == ("[14, 4, 5]", "[14, 4, 4]")


RAW = [
    ("empty", b"", 400, "malformed_body", None),
    ("not JSON", b"{'task': 1}", 400, "malformed_body", None),
    ("cut off", b'{"task": "amber", "prom', 400, "malformed_body", None),
    ("lone surrogate", b'{"task": "amber", "prompt": "\\ud800"}', 400, "malformed_body", None),
    ("broken UTF-8", b'{"task": "amber", "prompt": "\xff"}', 400, "malformed_body", None),
    ("deep", b'{"task": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400, "malformed_body", None),
    ("deep objects", b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 400, "malformed_body", None),
    ("a long number", b'{"task": "amber", "seed": ' + b"9" * 90_000 + b"}",
     400, "malformed_body", None),
    ("a list", b"[]", 422, "invalid_value", ""),
    ("NaN", b'{"task": "amber", "prompt": "x", "temperature": NaN}',
     422, "invalid_value", "temperature"),
    ("infinity", b'{"task": "amber", "prompt": "x", "deadline": 1e999}',
     422, "invalid_value", "deadline"),
]  # fmt: skip
JSON = {"Content-Type": "application/json"}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("data", "status", "code", "field"), [c[1:] for c in RAW], ids=[c[0] for c in RAW]
)
def test_a_broken_body_is_refused(
    live: LiveServer, data: bytes, status: int, code: str, field: str | None
) -> None:
    answer = live.client.post("/generate", content=data, headers=JSON)
    check(answer, status, code, field)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(live: LiveServer, literal: str) -> None:
    values = json.dumps(with_entry(nested(), "here")).replace('"here"', literal)
    body = f'{{"id": "new", "routing": {{"logits": {values}}}}}'
    answer = live.client.post("/tasks", content=body, headers=JSON)
    check(answer, 422, "invalid_routing", "routing.logits[1][2][3]")
    body = f'{{"id": "new", "copy_of": "amber", "metadata": {{"a": {literal}}}}}'
    answer = live.client.post("/tasks", content=body, headers=JSON)
    check(answer, 422, "invalid_value", "metadata.a")


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield b" " * 1000


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("path", ["/generate", "/score", "/tasks"])
def test_a_body_over_the_limit_is_413(live: LiveServer, path: str) -> None:
    check(live.client.post(path, content=b" " * 200_001, headers=JSON), 413, "body_too_large", None)
    answer = live.client.post(path, content=chunks(300_000), headers=JSON)
    assert "content-length" not in answer.request.headers
    check(answer, 413, "body_too_large", None)


def test_a_body_at_the_limit_is_read(live: LiveServer) -> None:
    body = b'{"task": "amber", "prompt": "x", "max_tokens": 1}'.ljust(200_000)
    assert live.client.post("/generate", content=body, headers=JSON).status_code == 200


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_another_content_type_is_415(live: LiveServer, headers: dict[str, str]) -> None:
    body = b'{"task": "amber", "prompt": "x"}'
    answer = live.client.post("/generate", content=body, headers=headers)
    check(answer, 415, "unsupported_content", None)


def test_a_content_type_may_have_parameters(live: LiveServer) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = b'{"task": "amber", "prompt": "x", "max_tokens": 1}'
    assert live.client.post("/generate", content=body, headers=headers).status_code == 200


FORM = {"task": (None, '{"id": "new"}'), "routing": ("r.safetensors", FILE)}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("parts", "status", "code", "field"),
    [
        ({"routing": ("r", FILE[:-8])}, 422, "invalid_routing", "routing.safetensors"),
        ({"routing": ("r", TERABYTES)}, 422, "invalid_routing", "routing.safetensors"),
        ({"routing": (None, "text")}, 400, "malformed_body", None),
        ({"task": (None, "{")}, 400, "malformed_body", None),
        ({"task": (None, '{"id": "a/b"}')}, 422, "invalid_value", "id"),
        ({"task": (None, '{"id": "new", "copy_of": "amber"}')}, 422, "invalid_value", "copy_of"),
        ({"more": ("m", b"x")}, 400, "malformed_body", None),
    ],
)
def test_a_wrong_form_is_refused(
    live: LiveServer, parts: Any, status: int, code: str, field: str | None
) -> None:
    check(live.client.post("/tasks", files=FORM | parts), status, code, field)


@pytest.mark.usefixtures("unharmed")
def test_a_form_that_is_none_is_refused(live: LiveServer) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        answer = live.client.post("/tasks", content=b"junk", headers={"Content-Type": kind})
        assert answer.status_code in (400, 422), answer.text
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tasks/nobody"),
        ("GET", "/tasks/nobody/routing"),
        ("GET", "/tasks/nobody/similar"),
        ("DELETE", "/tasks/nobody"),
        ("GET", "/tasks/-a"),
        ("GET", "/tasks/%00"),
        ("GET", "/tasks/a%0A"),
        ("GET", "/tasks/%F0%9F%92%A5"),
        ("DELETE", "/tasks/" + "x" * 129),
    ],
)
def test_an_unknown_task_is_404(live: LiveServer, method: str, path: str) -> None:
    check(live.client.request(method, path), 404, "unknown_task", None)


@pytest.mark.parametrize("path", ["/tasks/..%2F..%2Fetc", "/tasks/a%2Fb", "/nowhere"])
def test_an_unknown_path_is_404(live: LiveServer, path: str) -> None:
    check(live.client.get(path), 404, "not_found", None)


def test_another_method_is_405(live: LiveServer) -> None:
    answer = live.client.get("/generate")
    check(answer, 405, "method_not_allowed", None)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("limit=0", "invalid_value", "query.limit"),
        ("limit=1001", "invalid_value", "query.limit"),
        ("limit=x", "invalid_value", "query.limit"),
        ("cursor=zzz", "invalid_cursor", "query.cursor"),
        ("cursor=%F0%9F%92%A5", "invalid_cursor", "query.cursor"),
        ("metadata=x", "invalid_value", "query.metadata[0]"),
    ],
)
def test_a_wrong_query_is_422(live: LiveServer, query: str, code: str, field: str) -> None:
    check(live.client.get(f"/tasks?{query}"), 422, code, field)


def test_refusals_are_counted_by_code(live: LiveServer) -> None:
    def count() -> float:
        lines = live.client.get("/metrics").text.splitlines()
        name = 'polyhead_request_refusals_total{code="unknown_task"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = count()
    live.client.post("/generate", json={"task": "nobody", "prompt": "x"})
    assert count() == before + 1


def test_an_unfinished_body_does_not_hold_anyone_up(live: LiveServer) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"task": "amber", '
        live.generate(max_tokens=2)
        yield b'"prompt": "x", "max_tokens": 1}'

    answer = live.client.post("/generate", content=slowly(), headers=JSON)
    assert answer.status_code == 200
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"{live.url}/generate", content=iter([b"{"]), headers=JSON, timeout=1)
