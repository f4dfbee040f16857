"""Clients that stop reading, and clients that are gone, at every stage of a call."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import CONTEXT, LiveServer, serving, settings_for

LONG = {"task": "amber", "prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True}
LOUD = {**LONG, "stream": True, "n": 16, "logprobs": 20, "return_token_ids": True}
"""About 20 MB of events, more than the kernel's buffers take."""
STALL_SECONDS = 0.5
EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]


def connect(live: LiveServer, window: int | None = None) -> socket.socket:
    """A connection; window: bytes that the kernel takes before anybody reads."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if window is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.connect((host, int(port)))
    connection.settimeout(20)
    return connection


def request(path: str, body: dict[str, Any] | None = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    verb = "GET" if body is None else "POST"
    head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def idle(live: LiveServer, seconds: float = 5) -> None:
    """Wait until nothing of a call is left: no answer awaited, no seat, no cache row, no wait."""
    service = live.service
    live.eventually(lambda: service.bridge.waiting == 0, seconds)
    live.eventually(lambda: live.running() == 0, seconds)
    live.eventually(lambda: service.engine.stats().requests == 0, seconds)
    assert service.room.waiting == 0
    assert service.slots.pinned == 0


@pytest.fixture(scope="module")
def own(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = settings_for(
        model_folder,
        tmp_path_factory.mktemp("clients"),
        stream_stall_seconds=STALL_SECONDS,
        max_running=17,
        prefix_cache_tokens=0,
        max_fit_tokens=64,
    )
    with serving(settings) as server:
        server.generate()
        yield server


def read_all(connection: socket.socket) -> bytes:
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 20):
            found += data
    return bytes(found)


def test_a_stream_that_is_not_read_is_cut_off_and_neighbours_go_on(own: LiveServer) -> None:
    expected = own.generate(max_tokens=300)["choices"]
    with connect(own, window=4096) as deaf:
        deaf.sendall(request("/generate", LOUD))
        own.eventually(lambda: own.service.engine.stats().running == 16)
        assert own.generate(max_tokens=300)["choices"] == expected
        own.eventually(lambda: own.running() == 0, 20)
        idle(own)
        own.eventually(lambda: len(own.server.server_state.connections) <= 1)
        assert b"data: [DONE]" not in read_all(deaf)
    assert own.generate(max_tokens=300)["choices"] == expected


def test_a_stream_that_is_read_late_but_in_time_is_whole(own: LiveServer) -> None:
    with connect(own, window=4096) as slow:
        slow.sendall(request("/generate", {**LOUD, "max_tokens": 40}))
        own.eventually(lambda: own.service.engine.stats().running == 16)
        time.sleep(STALL_SECONDS / 2)
        found = b""
        while b"data: [DONE]" not in found:
            data = slow.recv(1 << 20)
            assert data
            found += data
    assert found.count(b'"finish_reason":"length"') == 16


def test_unread_outputs_are_bounded_and_one_more_frees_the_seats(
    model_folder: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        model_folder, tmp_path, stream_stall_seconds=600.0, max_unread_outputs=1024
    )
    with serving(settings) as own, connect(own, window=4096) as deaf:
        most = 0
        deaf.sendall(request("/generate", LOUD))
        own.eventually(lambda: own.service.engine.stats().running == 16)
        end = time.monotonic() + 60
        while own.running():
            unread = [len(a._arrived) for a in list(own.service.bridge._answers.values())]
            most = max(most, *unread, 0)
            assert time.monotonic() < end
            time.sleep(0.001)
        assert 512 < most <= 1024
        assert own.service.engine.stats().steps < CONTEXT - 1
        said = b""
        while b'"reader_too_slow"' not in said:  # whoever reads after all is told why it ends
            data = deaf.recv(1 << 20)
            assert data
            said = said[-200:] + data
        assert b"[DONE]" not in said
        idle(own)


def test_a_reader_that_keeps_up_is_not_bounded(model_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model_folder, tmp_path, max_unread_outputs=1024)
    with serving(settings) as own:
        answer = own.client.post("/generate", json=LOUD)
        assert answer.text.rstrip().endswith("data: [DONE]")
        assert own.generate(n=16, max_tokens=CONTEXT - 5)["usage"]["completion_tokens"] > 1024


@pytest.mark.parametrize("sent", [0.0, 0.3, 0.9])
def test_a_client_gone_before_the_end_of_its_body(own: LiveServer, sent: float) -> None:
    whole = request("/generate", {**LONG, "prompt": "x" * 5000})
    head = whole.index(b"\r\n\r\n") + 4
    before = files()
    for _ in range(20):
        with connect(own) as connection:
            connection.sendall(whole[: head + int(sent * (len(whole) - head))])
    own.eventually(lambda: files() <= before + 1)
    idle(own)


def test_a_client_gone_while_its_body_is_read_leaves_nothing(own: LiveServer) -> None:
    before, threads = files(), threading.active_count()
    for _ in range(20):
        with connect(own) as connection:
            connection.sendall(request("/generate", {**LONG, "stream": True}))
    own.eventually(lambda: files() <= before + 1)
    idle(own)
    assert threading.active_count() <= threads + 4


@pytest.mark.parametrize("path", ["/generate", "/score", "/v1/completions"])
def test_a_client_gone_in_line(own: LiveServer, path: str) -> None:
    body: dict[str, Any] = {**LONG}
    if path == "/score":
        body = {"task": "amber", "prompt": "x", "choices": ["a", "b"]}
    elif path == "/v1/completions":
        body = {"model": "amber", "prompt": ["x", "y"], "max_tokens": 100}
    stayed = own.start(n=16, max_tokens=CONTEXT - 5)
    other = own.start(max_tokens=CONTEXT - 5)
    with connect(own) as connection:
        connection.sendall(request(path, body))
        own.eventually(lambda: own.service.engine.stats().waiting >= 1)
    own.eventually(lambda: own.service.engine.stats().waiting == 0, 2)
    assert {stayed.result().status_code, other.result().status_code} == {200}
    idle(own)


def test_a_client_gone_in_prefill(model_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model_folder, tmp_path, max_running=1, max_step_tokens=1)
    with serving(settings) as own:
        own.generate(max_tokens=1)
        steps = own.service.engine.stats().steps
        with connect(own) as connection:
            connection.sendall(request("/generate", {**LONG, "prompt": "x" * 400, "max_tokens": 1}))
            own.eventually(lambda: own.service.engine.stats().steps > steps + 5)
        idle(own)
        assert own.service.engine.stats().steps < steps + 300
        assert own.service.metrics.exposition().count(b'finished_reason="abort"} 1.0') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_clients_gone_in_the_middle_of_their_answers(own: LiveServer, stream: bool) -> None:
    before = files()
    for _ in range(5):
        with connect(own) as connection:
            connection.sendall(request("/generate", {**LONG, "n": 4, "stream": stream}))
            own.eventually(lambda: own.service.engine.stats().running == 4)
        idle(own)
    own.eventually(lambda: files() <= before + 1)


def test_who_follows_a_fit_and_leaves_does_not_end_it(own: LiveServer) -> None:
    body = {"id": "followed", "examples": EXAMPLES, "fit": {"method": "z", "steps": 10_000}}
    job = own.client.post("/tasks", json=body).json()
    board = own.service.board
    for _ in range(3):
        with connect(own) as follower:
            follower.sendall(request(f"/jobs/{job['id']}/events"))
            said = b""
            while b"event: job" not in said:
                data = follower.recv(1 << 16)
                assert data
                said += data
            own.eventually(lambda: len(board._listeners) == 1)
        own.eventually(lambda: len(board._listeners) == 0, 15)
    assert own.client.get(f"/jobs/{job['id']}").json()["state"] in ("queued", "running")
    own.client.post(f"/jobs/{job['id']}/cancel")
    idle(own)
