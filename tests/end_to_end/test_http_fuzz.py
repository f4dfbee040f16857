"""Whatever is sent, no answer is a failure of the server."""

import json
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LiveServer

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(["amber", "base", "nobody", "../x", "{input}", 0, 1, 0.5, -1])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
REQUEST_FIELDS = [
    *("task", "mixture", "routing", "prompt", "input", "messages", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "stop", "repetition_penalty", "n", "logprobs", "stream", "ignore_eos"),
    *("return_token_ids", "deadline", "priority", "choices"),
]
TASK_FIELDS = [
    *("id", "routing", "copy_of", "private_adapter", "template", "defaults", "metadata"),
]
GENERATE = dict.fromkeys(REQUEST_FIELDS, VALUES)
TASK = dict.fromkeys(TASK_FIELDS, VALUES)
EASY = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
FINE = {200, 201, 400, 404, 409, 422}


def send(live: LiveServer, path: str, body: Any) -> None:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = live.client.post(path, content=data, headers=headers)
    assert answer.status_code in FINE, (body, answer.text)
    if answer.status_code == 201:
        assert live.client.delete(answer.headers["location"]).status_code == 204


@EASY
@given(
    change=st.fixed_dictionaries({}, optional=GENERATE), path=st.sampled_from(["generate", "score"])
)
def test_a_request_of_anything(live: LiveServer, change: dict[str, Any], path: str) -> None:
    whole = {"task": "amber", "prompt": "x"} | change
    if path == "generate":
        whole["max_tokens"] = 2
        whole.pop("choices", None)
    send(live, f"/{path}", {key: value for key, value in whole.items() if value is not None})


@EASY
@given(name=st.sampled_from(sorted(GENERATE)), value=VALUES)
def test_one_wrong_value_among_good_ones(live: LiveServer, name: str, value: Any) -> None:
    whole = {"task": "amber", "prompt": "x", "max_tokens": 2}
    send(live, "/generate", whole | {name: value})


@EASY
@given(body=st.fixed_dictionaries({}, optional=TASK))
def test_a_task_of_anything(live: LiveServer, body: dict[str, Any]) -> None:
    send(live, "/tasks", body)
    send(live, "/tasks", {"id": "new", "copy_of": "amber"} | body)


@EASY
@given(data=st.binary(max_size=200))
def test_any_bytes(live: LiveServer, data: bytes) -> None:
    for path in ("/generate", "/score", "/tasks"):
        headers = {"Content-Type": "application/json"}
        answer = live.client.post(path, content=data, headers=headers)
        assert answer.status_code in (400, 422)
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        parts = b"--b\r\nContent-Disposition: form-data; name=" + data + b"\r\n\r\n\r\n--b--\r\n"
        answer = live.client.post(path, content=parts, headers=form)
        assert answer.status_code in (400, 415, 422), answer.text


@EASY
@given(text=st.text(min_size=1, max_size=30))
def test_any_path_and_query(live: LiveServer, text: str) -> None:
    for path in (f"/tasks/{quote(text, safe='')}", "/tasks"):
        answer = live.client.get(path, params={"metadata": text, "cursor": text, "prefix": text})
        assert answer.status_code in (200, 404, 422), answer.text
    answer = live.client.get("/tasks", params={"metadata": f"{text}:{text}", "prefix": text})
    assert answer.status_code in (200, 422)
    answer = live.client.delete("/tasks/nobody", headers={"If-Match": repr(text)[:40].encode()})
    assert answer.status_code in (404, 412, 422)
