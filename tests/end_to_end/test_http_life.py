"""Clients that leave, engines that fail, servers that stop."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import CONTEXT, LiveServer, serving, settings_for
from ports import free_port
from safetensors.torch import save
from torch import nn

from polyhead.server.http.auth import is_loopback
from polyhead.server.http.serve import run

LONG = {"task": "amber", "prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True}


@pytest.fixture
def own(model_folder: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server for one test, which may break it."""
    with serving(settings_for(model_folder, tmp_path)) as server:
        yield server


@contextlib.contextmanager
def failing(model: nn.Module, error: BaseException) -> Iterator[None]:
    """Every forward pass of `model` raises `error`."""

    def fail(*_: Any) -> None:
        raise error

    hook = model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def send(live: LiveServer, body: dict[str, Any]) -> socket.socket:
    """Send a request and leave the answer on the wire."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_seats(own: LiveServer, stream: bool) -> None:
    own.generate()
    began = time.monotonic()
    with send(own, {**LONG, "stream": stream, "n": 8}):
        own.eventually(lambda: own.service.engine.stats().running == 8)
    own.eventually(lambda: own.running() == 0, 1)
    left = time.monotonic() - began
    steps = own.service.engine.stats().steps
    assert steps < CONTEXT / 2
    began = time.monotonic()
    stayed = own.client.post("/generate", json={**LONG, "n": 8})
    assert stayed.json()["choices"][0]["finish_reason"] == "length"
    assert time.monotonic() - began > left
    assert own.service.engine.stats().steps >= steps + CONTEXT - 1


def test_a_client_that_leaves_the_line_is_forgotten(model_folder: Path, tmp_path: Path) -> None:
    with serving(settings_for(model_folder, tmp_path, max_running=1)) as own:
        first = own.start(max_tokens=300)
        with send(own, LONG):
            own.eventually(lambda: own.service.engine.stats().waiting == 1)
        own.eventually(lambda: own.service.engine.stats().waiting == 0, 1)
        assert first.result().json()["usage"]["completion_tokens"] == 300


def test_a_full_line_says_when_to_come_back(model_folder: Path, tmp_path: Path) -> None:
    with serving(settings_for(model_folder, tmp_path, max_running=1, max_waiting=1)) as own:
        first = own.start(max_tokens=200)
        second = own.start(max_tokens=1)
        refused = own.client.post("/generate", json={**LONG, "stream": True})
        assert (refused.status_code, refused.json()["code"]) == (503, "engine_full")
        assert int(refused.headers["retry-after"]) >= 1
        unknown = {"task": "nobody", "prompt": "hi"}  # is not even looked up
        assert own.client.post("/generate", json=unknown).status_code == 503
        named = {"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}
        assert own.client.post("/v1/chat/completions", json=named).status_code == 503
        assert own.client.get("/health/ready").status_code == 200
        assert [f.result().status_code for f in (first, second)] == [200, 200]
        assert own.client.post("/generate", json=unknown).status_code == 404


def test_a_failed_step_costs_its_own_requests_only(own: LiveServer) -> None:
    expected = own.generate()["choices"]
    with failing(own.model, RuntimeError("secret")):
        answer = own.client.post("/generate", json=LONG)
    assert (answer.status_code, answer.json()["code"]) == (500, "generation_failed")
    assert "secret" not in answer.text
    assert own.generate()["choices"] == expected
    assert own.client.get("/health/ready").status_code == 200


def register_overflowing(own: LiveServer, module: int) -> None:
    """A task `large` whose outputs of one module are beyond float32."""
    shape = own.service.inventory.header.modules[module]
    tensors = {
        f"{shape.name}.A": torch.full((shape.in_features, 1), 1e30),
        f"{shape.name}.B": torch.full((1, shape.out_features), 1e30),
    }
    file = base64.b64encode(save(tensors)).decode()
    task = {"id": "large", "private_adapter": {"safetensors": file}}
    assert own.client.post("/tasks", json=task).status_code == 201


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_overflows_is_told_so(own: LiveServer, stream: bool) -> None:
    register_overflowing(own, module=-1)
    body = {"task": "large", "prompt": "hello", "max_tokens": 2, "stream": stream}
    answer = own.client.post("/generate", json={**body, "logprobs": 1})
    assert (answer.status_code, answer.json()["code"]) == (500, "generation_failed")
    assert "not finite" in answer.json()["detail"]
    scores = {"task": "large", "prompt": "hello", "choices": ["a"]}
    assert own.client.post("/score", json=scores).json()["code"] == "generation_failed"


def test_an_adapter_that_overflows_harms_nobody_else(own: LiveServer) -> None:
    expected = own.generate(max_tokens=300)["choices"]
    register_overflowing(own, module=2)
    running = own.start(max_tokens=300)
    for _ in range(3):
        body = {"task": "large", "prompt": "x" * 200, "max_tokens": 60, "n": 4, "temperature": 1.0}
        assert own.client.post("/generate", json=body).json()["code"] == "generation_failed"
    assert running.result().json()["choices"] == expected
    assert own.generate(max_tokens=300)["choices"] == expected


def test_an_error_after_the_first_byte_is_an_event(own: LiveServer) -> None:
    body = {**LONG, "stream": True}
    with own.client.stream("POST", "/generate", json=body) as answer:
        lines = answer.iter_lines()
        assert "text" in json.loads(next(lines).removeprefix("data: "))
        with failing(own.model, RuntimeError("secret")):
            rest = list(lines)
    assert answer.status_code == 200
    place = rest.index("event: error")
    problem = json.loads(rest[place + 1].removeprefix("data: "))
    assert (problem["status"], problem["code"]) == (500, "generation_failed")
    assert "data: [DONE]" not in rest


def test_a_dead_engine_is_told_to_everyone_and_ends_the_server(own: LiveServer) -> None:
    ready = own.client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    running = own.start(**LONG)
    with failing(own.model, SystemExit("the device is gone")):
        answer = running.result()
        assert (answer.status_code, answer.json()["code"]) == (503, "engine_dead")
    assert answer.headers["retry-after"]
    own.eventually(lambda: own.server.engine_died)
    own.eventually(lambda: not own.server.servers or not own.server.servers[0].is_serving())


def test_a_dead_engine_is_not_ready(own: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stay(counter: int) -> bool:  # noqa: ARG001
        return own.server.should_exit

    monkeypatch.setattr(own.server, "on_tick", stay)
    with failing(own.model, SystemExit("the device is gone")):
        assert own.client.post("/generate", json=LONG).status_code == 503
    for call in (lambda: own.client.get("/health/ready"),
                 lambda: own.client.post("/generate", json=LONG)):  # fmt: skip
        answer = call()
        assert (answer.status_code, answer.json()["code"]) == (503, "engine_dead")
        assert answer.headers["retry-after"]
    assert own.client.get("/health/live").status_code == 200


def drain(own: LiveServer) -> None:
    loop = own.server.servers[0].get_loop()
    loop.call_soon_threadsafe(own.server.begin_drain)
    own.eventually(lambda: own.service.engine.draining)


def test_a_draining_server_finishes_what_it_began(own: LiveServer) -> None:
    expected = own.generate(max_tokens=300)["choices"]
    running = own.start(max_tokens=300)
    drain(own)
    ready = own.client.get("/health/ready")
    assert (ready.status_code, ready.json()["code"]) == (503, "engine_draining")
    refused = own.client.post("/generate", json=LONG)
    assert (refused.status_code, refused.json()["code"]) == (503, "engine_draining")
    assert refused.headers["retry-after"]
    assert own.client.get("/health/live").status_code == 200
    assert running.result().json()["choices"] == expected


def test_what_does_not_finish_in_time_is_answered_as_far_as_it_came(
    model_folder: Path, tmp_path: Path
) -> None:
    with serving(settings_for(model_folder, tmp_path, drain_seconds=0.1)) as own:
        running = own.start(n=16, max_tokens=CONTEXT - 5)
        drain(own)
        answer = running.result().json()
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"abort"}
        assert 0 < answer["usage"]["completion_tokens"] < 16 * (CONTEXT - 5)


def test_the_metrics_count(own: LiveServer) -> None:
    def read() -> dict[str, float]:
        lines = own.client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
                for line in lines if not line.startswith("#")}  # fmt: skip

    own.generate(prompt="hello", max_tokens=8)
    own.client.post("/generate", json={**LONG, "max_tokens": 4, "stream": True})
    found = read()
    assert found["polyhead_prompt_tokens_total"] == 6
    assert found["polyhead_generation_tokens_total"] == 12
    assert found["polyhead_time_to_first_token_seconds_count"] == 2
    assert found["polyhead_inter_token_latency_seconds_count"] == 10
    assert found["polyhead_e2e_request_latency_seconds_count"] == 2
    assert found['polyhead_request_success_total{finished_reason="length"}'] == 2
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [found[f"polyhead_{gauge}"] for gauge in gauges] == [0, 0, 0]
    running = own.start(max_tokens=CONTEXT - 5, n=2)
    own.eventually(lambda: read()["polyhead_num_requests_running"] == 2)
    assert 0 < read()["polyhead_kv_cache_usage_perc"] < 1
    running.result()


def test_other_addresses_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings_for(model_folder, tmp_path, host="0.0.0.0")) == 2
    assert "0.0.0.0" in (said := capsys.readouterr().err)
    assert "--allow-remote" in said
    assert is_loopback("127.0.0.2")
    assert is_loopback("::1")
    assert not is_loopback("example.org")


SCRIPT = """
import sys
from polyhead.server.config import Settings
from polyhead.server.http.serve import run
sys.exit(run(Settings.model_validate_json(sys.argv[1])))
"""


@contextlib.contextmanager
def process(model_folder: Path, data_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server as a process of its own, ready, and its address."""
    port = free_port()
    settings = settings_for(model_folder, data_dir, port=port)
    command = [sys.executable, "-c", SCRIPT, settings.model_dump_json()]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as server:
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health/ready").status_code == 200:
                        break
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            yield server, url
        finally:
            server.kill()


def test_sigterm_drains_and_exits_with_0(model_folder: Path, tmp_path: Path) -> None:
    with process(model_folder, tmp_path) as (server, url):
        body = {**LONG, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 200
        assert rest[-1] == "data: [DONE]"
        assert server.wait(10) == 0


def test_a_registered_task_survives_sigkill(model_folder: Path, tmp_path: Path) -> None:
    with process(model_folder, tmp_path) as (server, url):
        answer = httpx.post(f"{url}/tasks", json={"id": "new", "copy_of": "amber"}, timeout=60)
        server.kill()
        assert answer.status_code == 201
    with serving(settings_for(model_folder, tmp_path)) as own:
        assert own.client.get("/tasks/new").json() == answer.json()


def test_a_taken_port_exits_with_an_error(model_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = settings_for(model_folder, tmp_path, port=taken.getsockname()[1])
        command = [sys.executable, "-c", SCRIPT, settings.model_dump_json()]
        found = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert found.returncode != 0
    assert b"address already in use" in found.stderr


def test_health_answers_while_64_requests_decode(model_folder: Path, tmp_path: Path) -> None:
    with (
        serving(settings_for(model_folder, tmp_path)) as own,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(64):
            stack.enter_context(send(own, {**LONG, "stream": True}))
        own.eventually(lambda: own.service.engine.stats().running == 64, 20)  # none is refused
        seconds = []
        for _ in range(100):
            began = time.monotonic()
            assert own.client.get("/health/live").json() == {"status": "live"}
            seconds.append(time.monotonic() - began)
        assert own.running() > 0
        # Everything shares this process and its lock here; benchmarks/liveness.py measures it.
        assert sorted(seconds)[98] < 0.5
