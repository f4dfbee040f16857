"""A server with keys: who gets in, to what, how often, and what nobody learns."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from live_server import LiveServer, serving, settings_for

from polyhead.server.http.auth import Needs
from polyhead.server.http.keys import hash_of, new_key
from polyhead.server.http.serve import run

OPEN = {"/health/live", "/health/ready", "/openapi.json"}
LIMITS: dict[str, dict[str, Any]] = {
    "all": {"scopes": ["generate", "tasks", "admin"]},
    "generate": {"scopes": ["generate"]},
    "tasks": {"scopes": ["tasks"]},
    "acme": {"scopes": ["generate", "tasks"], "task_prefix": "acme-"},
    "zeta": {"scopes": ["generate", "tasks"], "task_prefix": "zeta-"},
    "rare": {"scopes": ["generate"], "requests_per_minute": 1},
    "short": {"scopes": ["generate"], "tokens_per_minute": 12},
    "single": {"scopes": ["generate"], "max_concurrent": 1},
    "late": {"scopes": ["generate"]},
}
KEYS = {name: new_key() for name in LIMITS}
ASK = {"task": "base", "prompt": "hello", "max_tokens": 2, "ignore_eos": True}


def write_keys(path: Path, names: list[str]) -> None:
    entries = [{"id": name, "hash": hash_of(KEYS[name]), **LIMITS[name]} for name in names]
    path.write_text(json.dumps({"keys": entries}))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    write_keys(path, [name for name in LIMITS if name != "late"])
    return path


@pytest.fixture(scope="module")
def keyed(
    model_folder: Path, keys_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with keys, and a task `acme-a` and `zeta-z` for the two tenants."""
    settings = settings_for(
        model_folder,
        tmp_path_factory.mktemp("keyed"),
        api_keys_file=keys_file,
        cors_origin=["https://app.example"],
    )
    with serving(settings) as server:
        for name in ("acme-a", "zeta-z"):
            body = {"id": name, "copy_of": "amber"}
            answer = server.client.post("/tasks", json=body, headers=bearer("all"))
            assert answer.status_code == 201, answer.text
        yield server


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def call(live: LiveServer, key: str, method: str, path: str, **rest: Any) -> httpx.Response:
    return live.client.request(method, path, headers=bearer(key), **rest)


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code
    return problem


def needs_of(context: Any) -> list[Needs]:
    """What `context`'s route asks for, in its own dependencies and in those of its routers."""
    if getattr(context, "dependant", None) is None:
        return []
    asked = [d.call for d in context.dependant.dependencies if isinstance(d.call, Needs)]
    return [needs for needs in asked if needs.scopes]


def test_every_route_needs_a_scope(keyed: LiveServer) -> None:
    app: Any = keyed.server.config.app
    without = {c.path for c in iter_route_contexts(app.routes) if not needs_of(c)}
    assert without == OPEN
    assert len(list(iter_route_contexts(app.routes))) > 20


def test_no_described_call_answers_without_a_key(keyed: LiveServer) -> None:
    described = keyed.client.get("/openapi.json").json()["paths"]
    asked = 0
    for path, methods in described.items():
        for method in methods:
            if path not in OPEN:
                answer = keyed.client.request(method, path.replace("{", "").replace("}", ""))
                assert answer.status_code == 401, (method, path, answer.text)
                asked += 1
    assert asked > 20


def test_health_is_open(keyed: LiveServer) -> None:
    assert keyed.client.get("/health/live").status_code == 200
    assert keyed.client.get("/health/ready").status_code == 200


def test_a_call_without_a_key_is_401(keyed: LiveServer) -> None:
    answer = keyed.client.post("/generate", json=ASK)
    refused(answer, 401, "key_missing")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["Bearer wrong", f"Bearer {KEYS['all']}x", f"bearer {KEYS['late']}"]
)
def test_a_wrong_key_is_401(keyed: LiveServer, header: str) -> None:
    answer = keyed.client.post("/generate", json=ASK, headers={"Authorization": header})
    refused(answer, 401, "key_invalid")
    assert "invalid_token" in answer.headers["www-authenticate"]


@pytest.mark.parametrize("name", ["key", "api_key", "access_token", "authorization"])
def test_a_key_in_the_query_does_not_count(keyed: LiveServer, name: str) -> None:
    answer = keyed.client.get("/tasks", params={name: KEYS["all"]})
    refused(answer, 401, "key_missing")


def test_another_scheme_does_not_count(keyed: LiveServer) -> None:
    answer = keyed.client.get("/tasks", auth=("x", KEYS["all"]))
    refused(answer, 401, "key_missing")


@pytest.mark.parametrize(
    ("key", "method", "path", "scope"),
    [
        ("generate", "GET", "/tasks", "tasks"),
        ("generate", "DELETE", "/tasks/amber", "tasks"),
        ("generate", "GET", "/jobs", "tasks"),
        ("generate", "GET", "/metrics", "admin"),
        ("tasks", "POST", "/generate", "generate"),
        ("tasks", "POST", "/score", "generate"),
        ("tasks", "GET", "/metrics", "admin"),
    ],
)
def test_another_scope_is_403(
    keyed: LiveServer, key: str, method: str, path: str, scope: str
) -> None:
    answer = call(keyed, key, method, path)
    assert scope in refused(answer, 403, "scope_missing")["detail"]
    assert f'scope="{scope}"' in answer.headers["www-authenticate"]


def test_the_right_scope_is_let_in(keyed: LiveServer) -> None:
    assert call(keyed, "generate", "POST", "/generate", json=ASK).status_code == 200
    assert call(keyed, "tasks", "GET", "/tasks").status_code == 200
    assert call(keyed, "all", "GET", "/metrics").status_code == 200
    assert call(keyed, "generate", "GET", "/inventory").status_code == 200
    assert call(keyed, "tasks", "GET", "/inventory").status_code == 200


def test_openai_calls_are_refused_in_openais_form(keyed: LiveServer) -> None:
    answer = keyed.client.get("/v1/models")
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert call(keyed, "tasks", "GET", "/v1/models").status_code == 403


# What a tenant sees.

FOREIGN = ["zeta-z", "zeta-absent", "amber", "absent"]
BODY = {"logits": [[[0.0] * 4] * 4] * 14}
PATHS = [
    ("GET", "/tasks/{}", None),
    ("PUT", "/tasks/{}", {"routing": BODY}),
    ("PATCH", "/tasks/{}", {"metadata": {}}),
    ("DELETE", "/tasks/{}", None),
    ("GET", "/tasks/{}/routing", None),
    ("GET", "/tasks/{}/similar", None),
    ("GET", "/tasks/{}/history", None),
    ("POST", "/tasks/{}/rollback", {"generation": "x"}),
    ("POST", "/tasks/{}/restore", None),
    ("POST", "/tasks/{}/fit", {"examples": [{"input": "a", "output": "b"}]}),
    ("GET", "/v1/models/{}", None),
]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"task": "NAME", "prompt": "x"}),
    ("/generate", {"mixture": {"acme-a": 1.0, "NAME": 1.0}, "prompt": "x"}),
    ("/score", {"task": "NAME", "prompt": "x", "choices": ["y"]}),
    ("/tasks", {"id": "acme-new", "copy_of": "NAME"}),
    ("/v1/completions", {"model": "NAME", "prompt": "x"}),
    ("/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "x"}]}),
]


def named(answer: httpx.Response, name: str) -> tuple[int, str, str]:
    """Status, body and content type, with the asked name taken out."""
    text = answer.text.replace(name, "NAME")
    return answer.status_code, text, answer.headers["content-type"]


@pytest.mark.parametrize(("method", "path", "body"), PATHS)
def test_a_foreign_task_is_absent(keyed: LiveServer, method: str, path: str, body: Any) -> None:
    there = keyed.service.registry.list()[0]
    answers = {
        named(call(keyed, "acme", method, path.format(name), json=body), name)
        for name in [*FOREIGN, "acme-absent"]
    }
    assert len(answers) == 1
    assert next(iter(answers))[0] == 404
    assert keyed.service.registry.list()[0] == there
    control = call(keyed, "acme", "GET", "/tasks/acme-a")
    assert control.status_code == 200


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_foreign_task_named_in_a_body_is_absent(
    keyed: LiveServer, path: str, body: dict[str, Any]
) -> None:
    answers = set()
    for name in [*FOREIGN, "acme-absent"]:
        whole = json.loads(json.dumps(body).replace("NAME", name))
        answers.add(named(call(keyed, "acme", "POST", path, json=whole), name))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 404


def test_nothing_is_looked_up_for_a_foreign_task(
    keyed: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    registry, catalogue = keyed.service.registry, keyed.service.admission.answerers.catalogue
    for owner, method in ((registry, "get"), (registry, "load"), (catalogue, "resolve")):
        real = getattr(owner, method)
        monkeypatch.setattr(
            type(owner), method, lambda _, name, real=real: asked.append(name) or real(name)
        )
    for name in ("zeta-z", "acme-a"):
        call(keyed, "acme", "GET", f"/tasks/{name}")
        call(keyed, "acme", "GET", f"/tasks/{name}/routing")
        call(keyed, "acme", "POST", "/generate", json={**ASK, "task": name})
    assert asked == ["acme-a"] * len(asked)
    assert len(asked) >= 3


@pytest.mark.parametrize("name", ["zeta-z", "zeta-new", "amber", "new"])
def test_a_new_task_must_bear_the_prefix(keyed: LiveServer, name: str) -> None:
    body = {"id": name, "copy_of": "acme-a"}
    problem = refused(call(keyed, "acme", "POST", "/tasks", json=body), 403, "outside_prefix")
    assert "'acme-'" in problem["detail"]


def test_a_tenant_uses_its_own_tasks_and_the_backbone(keyed: LiveServer) -> None:
    for task in ("acme-a", "base"):
        answer = call(keyed, "acme", "POST", "/generate", json={**ASK, "task": task})
        assert answer.status_code == 200, answer.text
    body = {"id": "acme-b", "copy_of": "acme-a"}
    assert call(keyed, "acme", "POST", "/tasks", json=body).status_code == 201
    assert call(keyed, "acme", "DELETE", "/tasks/acme-b").status_code == 204


def test_a_tenant_lists_its_own_tasks_only(keyed: LiveServer) -> None:
    def listed(key: str, query: str = "") -> list[str]:
        found = call(keyed, key, "GET", f"/tasks{query}").json()
        return [task["id"] for task in found["tasks"]]

    assert listed("all") == ["acme-a", "amber", "birch", "coral", "zeta-z"]
    assert listed("acme") == ["acme-a"]
    for prefix in ("", "a", "acme-"):
        assert listed("acme", f"?prefix={prefix}") == ["acme-a"]
    for prefix in ("zeta-", "amber", "b", "~"):
        assert listed("acme", f"?prefix={prefix}") == []
    cursor = call(keyed, "all", "GET", "/tasks?limit=2").json()["next"]
    assert listed("acme", f"?cursor={cursor}") == []
    assert listed("zeta", f"?cursor={cursor}") == ["zeta-z"]


def test_a_tenant_finds_its_own_models_and_neighbours_only(keyed: LiveServer) -> None:
    models = call(keyed, "acme", "GET", "/v1/models").json()["data"]
    assert {model["id"] for model in models} == {"base", "acme-a"}
    similar = call(keyed, "acme", "GET", "/tasks/acme-a/similar").json()["similar"]
    assert similar == []
    similar = call(keyed, "all", "GET", "/tasks/acme-a/similar").json()["similar"]
    assert {"amber", "zeta-z"} <= {found["id"] for found in similar}


def test_a_tenant_sees_its_own_jobs_only(keyed: LiveServer) -> None:
    examples = [{"input": f"{i}", "output": "x"} for i in range(4)]
    body = {"id": "zeta-fit", "examples": examples, "fit": {"method": "z", "steps": 1}}
    job = call(keyed, "zeta", "POST", "/tasks", json=body)
    assert job.status_code == 202, job.text
    name = job.json()["id"]
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
        problem = refused(call(keyed, "acme", method, f"/jobs/{name}{path}"), 404, "unknown_job")
        absent = refused(call(keyed, "acme", method, f"/jobs/absent{path}"), 404, "unknown_job")
        assert {**problem, "detail": ""} == {**absent, "detail": ""}
    for query in ("", "?task=zeta-fit", "?state=queued"):
        assert call(keyed, "acme", "GET", f"/jobs{query}").json()["jobs"] == []
    assert [j["id"] for j in call(keyed, "zeta", "GET", "/jobs").json()["jobs"]] == [name]
    assert call(keyed, "zeta", "POST", f"/jobs/{name}/cancel").status_code in (200, 409)


# How much.


def test_requests_per_minute(keyed: LiveServer) -> None:
    assert call(keyed, "rare", "POST", "/generate", json=ASK).status_code == 200
    answer = call(keyed, "rare", "POST", "/generate", json=ASK)
    refused(answer, 429, "request_rate_exceeded")
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert call(keyed, "generate", "POST", "/generate", json=ASK).status_code == 200


def test_tokens_per_minute_count_prompt_and_answer(keyed: LiveServer) -> None:
    """12 a minute: a prompt of 5 and 16 answered leave a debt of 9, so 1 more comes in 50 s."""
    answer = call(keyed, "short", "POST", "/generate", json={**ASK, "max_tokens": 16})
    assert answer.status_code == 200
    usage = answer.json()["usage"]
    used = usage["prompt_tokens"] + usage["completion_tokens"]
    answer = call(keyed, "short", "POST", "/generate", json=ASK)
    refused(answer, 429, "token_rate_exceeded")
    assert int(answer.headers["retry-after"]) == pytest.approx((used - 12 + 1) * 5, abs=2)


def test_calls_at_the_same_time(keyed: LiveServer) -> None:
    whole = {**ASK, "max_tokens": 400, "stream": True}
    headers = bearer("single")
    with keyed.client.stream("POST", "/generate", json=whole, headers=headers) as running:
        assert running.status_code == 200
        answer = call(keyed, "single", "POST", "/generate", json=ASK)
        refused(answer, 429, "too_many_at_once")
        assert answer.headers["retry-after"] == "1"
    keyed.eventually(
        lambda: call(keyed, "single", "POST", "/generate", json=ASK).status_code == 200
    )


# The file.


def test_the_file_is_followed_while_serving(keyed: LiveServer, keys_file: Path) -> None:
    def status(name: str) -> int:
        return call(keyed, name, "POST", "/generate", json=ASK).status_code

    assert status("late") == 401
    write_keys(keys_file, list(LIMITS))
    keyed.eventually(lambda: status("late") == 200)
    keys_file.write_text("{")
    time.sleep(1.2)
    assert status("late") == 200, "a broken file changes nothing"
    write_keys(keys_file, [name for name in LIMITS if name != "late"])
    keyed.eventually(lambda: status("late") == 401)


@contextmanager
def whole_log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the client's own
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def test_no_key_is_ever_logged(
    keyed: LiveServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("on purpose")

    wrong = new_key()
    with whole_log() as lines:
        call(keyed, "acme", "POST", "/generate", json=ASK)
        keyed.client.get("/tasks", headers={"Authorization": f"Bearer {wrong}"})
        monkeypatch.setattr(type(keyed.service.registry), "get", break_down)
        keyed.client.get("/tasks", params={"api_key": KEYS["tasks"]})
        # The server closes this connection, so it is not one of the shared client's.
        broken = httpx.get(f"{keyed.url}/tasks/amber", headers=bearer("all"), trust_env=False)
        assert broken.status_code == 500
    log = "\n".join([*lines, *capfd.readouterr()])
    assert "on purpose" in log
    for key in (*KEYS.values(), wrong):
        assert key not in log
        assert hash_of(key).partition(":")[2] not in log


# Where from.


def test_other_sites_pages_may_not_read(keyed: LiveServer, live: LiveServer) -> None:
    asking = {"Access-Control-Request-Method": "POST"}
    for server, origin, allowed in (
        (keyed, "https://app.example", True),
        (keyed, "https://evil.example", False),
        (live, "https://app.example", False),
    ):
        answer = server.client.options("/generate", headers={**asking, "Origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    headers = {**bearer("all"), "Origin": "https://app.example"}
    answer = keyed.client.get("/tasks/absent", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "//["])
def test_without_keys_other_sites_pages_may_not_call(live: LiveServer, origin: str) -> None:
    form = {"task": (None, '{"id": "evil"}'), "routing": ("r", b"x")}
    answer = live.client.post("/tasks", files=form, headers={"Origin": origin})
    refused(answer, 403, "cross_origin")
    own = live.client.get("/tasks", headers={"Origin": live.url})
    assert own.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[", "10.0.0.1"])
def test_without_keys_only_loopbacks_names_are_answered_for(live: LiveServer, host: str) -> None:
    refused(live.client.get("/tasks", headers={"Host": host}), 403, "foreign_host")
    for own in ("localhost", "localhost:1", "127.0.0.1", "[::1]:80"):
        assert live.client.get("/tasks", headers={"Host": own}).status_code == 200


def test_with_keys_the_host_may_be_any(keyed: LiveServer) -> None:
    headers = {**bearer("all"), "Host": "api.example", "Origin": "https://evil.example"}
    assert keyed.client.get("/tasks", headers=headers).status_code == 200


def test_a_server_does_not_start_with_a_broken_file(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(model_folder, tmp_path, api_keys_file=tmp_path / "no.toml")
    assert run(settings) == 2
    assert "--api-keys-file" in capsys.readouterr().err


def test_a_flood_of_refusals_leaves_nobody_behind(keyed: LiveServer) -> None:
    """Refused calls take no turn, so none is left over after many of them at once."""

    def flood() -> None:
        with httpx.Client(base_url=keyed.url, trust_env=False) as client:
            for _ in range(20):
                client.post("/generate", json=ASK, headers=bearer("rare"))

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert call(keyed, "single", "POST", "/generate", json=ASK).status_code == 200
