"""What a server stands on goes away, is broken, or is held on to."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PostgresServer
from server_process import ServerProcess, server_process

OUTAGE_SECONDS = float(os.environ.get("TEST_OUTAGE_SECONDS", "2"))
CONNECTIONS = 1000


def say(server: ServerProcess, task: str = "amber") -> Any:
    body = {"task": task, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = server.client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_without_postgresql_known_tasks_are_served_and_changes_refused(
    model_folder: Path,
    tmp_path: Path,
    postgresql: PostgresServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = postgresql.new_database()
    with server_process(model_folder, tmp_path, database_url=url) as server:
        expected = say(server)
        postgresql.stop()
        try:
            end = time.monotonic() + OUTAGE_SECONDS
            while time.monotonic() < end:
                assert say(server) == expected
                refused = server.client.post("/tasks", json={"id": "new", "copy_of": "amber"})
                assert refused.status_code == 503, refused.text
                assert refused.headers["retry-after"]
        finally:
            postgresql.start()
        end = time.monotonic() + 10
        while server.client.post("/tasks", json={"id": "new", "copy_of": "amber"}).is_error:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert say(server, "new") == expected
        assert say(server, "birch") != expected
        told: list[str] = []
        while not any("that is over" in line for line in told):
            assert time.monotonic() < end, told
            told += [line for line in capfd.readouterr().err.splitlines() if "not heard" in line]
            time.sleep(0.1)
    assert sum("ERROR" in line for line in told) <= 1 + OUTAGE_SECONDS / 30
    assert sum("that is over" in line for line in told) == 1


@pytest.mark.parametrize("name", ["inventory.json", "inventory.safetensors"])
def test_a_corrupt_inventory_is_refused_by_name(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    broken = tmp_path / "inventory"
    broken.mkdir()
    for file in (model_folder / "inventory").glob("inventory.*"):
        (broken / file.name).write_bytes(file.read_bytes())
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-c", "from polyhead.server.cli import app; app()"]
    folders = ["--backbone", str(model_folder / "backbone"), "--data-dir", str(tmp_path / "data")]
    serve = [*command, "serve", "--inventory", str(broken), "--port", "0", *folders]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert any(name in line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.stderr


def test_a_thousand_connections_that_say_nothing_keep_nobody_out(
    model_folder: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 500
    if hard < wanted:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with server_process(model_folder, tmp_path) as server:
            expected = say(server)
            files = Path(f"/proc/{server.process.pid}/fd")
            before = len(list(files.iterdir()))
            address = ("127.0.0.1", server.client.base_url.port)
            with contextlib.ExitStack() as stack:
                for _ in range(CONNECTIONS):
                    stack.enter_context(socket.create_connection(address))
                assert say(server) == expected
                end = time.monotonic() + 10
                while len(list(files.iterdir())) < before + CONNECTIONS:  # they are really held
                    assert time.monotonic() < end
                    time.sleep(0.05)
                assert say(server) == expected
            end = time.monotonic() + 10
            while len(list(files.iterdir())) > before + 5:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert say(server) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
