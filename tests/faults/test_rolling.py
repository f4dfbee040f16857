"""Two servers behind a proxy are restarted, one after the other, under load: no request fails."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import TASKS
from ports import free_port
from postgres_server import PostgresServer
from server_process import ServerProcess, server_process

CONFIG = Path(__file__).parents[2] / "docker" / "haproxy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
CLIENTS = 3
DELAY_SECONDS = 3.0
"""Without it some are refused once in a while: a draining server is asked until a check fails."""

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")


@dataclass
class Proxy:
    """A running HAProxy: its address, and what it thinks of its servers."""

    url: str
    admin: Path

    def up(self) -> set[str]:
        """Names of the servers that requests are sent to."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(self.admin))
            asked.sendall(b"show stat\n")
            said = b"".join(iter(lambda: asked.recv(1 << 16), b"")).decode()
        rows = [line.split(",") for line in said.splitlines() if line.startswith("polyhead,")]
        return {row[1] for row in rows if row[17].startswith("UP") and row[1] != "BACKEND"}

    def wait_for(self, *names: str) -> None:
        end = time.monotonic() + 30
        while self.up() != set(names):
            assert time.monotonic() < end, self.up()
            time.sleep(0.05)


@contextlib.contextmanager
def proxy(folder: Path, one: str, other: str) -> Iterator[Proxy]:
    port, admin = free_port(), folder / "admin.sock"
    variables = {"BIND": f"127.0.0.1:{port}", "ONE": one, "OTHER": other, "ADMIN": str(admin)}
    command = [str(HAPROXY), "-db", "-f", str(CONFIG)]
    with subprocess.Popen(command, env={**os.environ, **variables}) as process:
        try:
            end = time.monotonic() + 10
            while not admin.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield Proxy(f"http://127.0.0.1:{port}", admin)
        finally:
            process.terminate()


@dataclass
class Load:
    """Clients that ask all the while, and what came of it."""

    url: str
    expected: dict[str, Any]
    failed: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        clients = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._stop.set()
            for client in clients:
                client.join(60)

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            turn = number
            while not self._stop.is_set():
                turn += 1
                task, streamed = TASKS[turn % 3], turn % 2 == 0
                try:
                    self._ask(client, task, streamed)
                except (httpx.HTTPError, AssertionError) as exc:
                    self.failed.append(f"{task}: {type(exc).__name__} {exc}")
                self.done["stream" if streamed else "whole"] += 1

    def _ask(self, client: httpx.Client, task: str, streamed: bool) -> None:
        body = request(task) | {"stream": streamed}
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, f"{answer.status_code} {answer.headers} {answer.text}"
        if streamed:
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-300:]
        else:
            assert answer.json()["choices"] == self.expected[task]


def request(task: str) -> dict[str, Any]:
    return {"task": task, "prompt": "hello", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def test_a_rolling_restart_fails_no_request(
    model_folder: Path, tmp_path: Path, postgresql: PostgresServer
) -> None:
    url = postgresql.new_database()
    settings = {"database_url": url, "drain_delay_seconds": DELAY_SECONDS, "log_level": "warning"}
    with contextlib.ExitStack() as stack:

        def start(name: str, port: int | None = None) -> ServerProcess:
            context = server_process(model_folder, tmp_path / name, port=port, **settings)
            return stack.enter_context(context)

        servers = {name: start(name) for name in ("one", "other")}
        ports = {name: server.client.base_url.port for name, server in servers.items()}
        addresses = [f"127.0.0.1:{ports[name]}" for name in ("one", "other")]
        balancer = stack.enter_context(proxy(tmp_path, *addresses))
        balancer.wait_for("one", "other")
        answers = {
            task: servers["one"].client.post("/generate", json=request(task)) for task in TASKS
        }
        expected = {task: answer.json()["choices"] for task, answer in answers.items()}
        assert expected["amber"] != expected["birch"]  # or a wrong answer would not show
        load = Load(balancer.url, expected)
        with load.running():
            time.sleep(0.5)
            for name in ("one", "other"):
                servers[name].process.send_signal(signal.SIGTERM)
                assert servers[name].process.wait(30) == 0
                assert name not in balancer.up()
                start(name, ports[name])
                balancer.wait_for("one", "other")  # before the next: one of them has to be there
        assert load.failed == []
        assert min(load.done.values()) > 20
