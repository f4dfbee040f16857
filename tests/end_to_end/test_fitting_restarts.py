"""Jobs outlive the server: killed or told to end, the next one goes on with them."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from server_process import ServerProcess, server_process

from polyhead.server.tasks import job_rows
from polyhead.server.tasks.sql import Database

EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
STEPS = 300
FIT = {"method": "z", "steps": STEPS, "holdout": 0.25, "seed": 3}
"""Some seconds of work, scored (and with that saved) every fifty steps."""


def submit(server: ServerProcess, task: str) -> str:
    answer = server.client.post("/tasks", json={"id": task, "examples": EXAMPLES, "fit": FIT})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(server: ServerProcess, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/jobs/{job_id}").json()
    return found


def reach(server: ServerProcess, job_id: str, step: int, seconds: float = 120) -> dict[str, Any]:
    """The job once it has come to `step` or has ended."""
    end = time.monotonic() + seconds
    while (found := job(server, job_id))["progress"]["step"] < step:
        if found["state"] not in ("queued", "running"):
            break
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def finish(server: ServerProcess, job_id: str) -> dict[str, Any]:
    end = time.monotonic() + 120
    while (found := job(server, job_id))["state"] in ("queued", "running"):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def first_point(server: ServerProcess, job_id: str) -> int:
    """The step of the first news of a job's run."""
    with server.client.stream("GET", f"/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert any(line == "event: progress" for line in lines)
        return int(json.loads(next(lines).removeprefix("data: "))["step"])


def generation(server: ServerProcess, task: str) -> str:
    return str(server.client.get(f"/tasks/{task}").json()["generation"])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_sigterm_saves_what_runs_and_the_next_server_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    with server_process(model_folder, tmp_path, max_fit_tokens=64) as server:
        whole = submit(server, "whole")
        assert finish(server, whole)["state"] == "succeeded"
        expected = generation(server, "whole")
        cut, waiting = submit(server, "cut"), submit(server, "waiting")
        before = reach(server, cut, step=60)["progress"]["step"]
        assert before < STEPS
        (worker,) = server.children()
        with server.client.stream("GET", f"/jobs/{cut}/events") as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-2] == "event: error"
        assert "engine_draining" in rest[-1]
        assert server.process.wait(60) == 0
        assert not alive(worker)
    database = Database(tmp_path, lock_timeout=5)
    with database.read() as connection:
        saved = job_rows.find(connection, cut)
    database.close()
    assert (saved.state, saved.attempts) == ("queued", 0)
    assert len(list((tmp_path / "fits").iterdir())) == 1
    with server_process(model_folder, tmp_path, max_fit_tokens=64) as server:
        step = saved.progress["step"]
        assert step >= before
        assert first_point(server, cut) in (step, step + 1)  # the last one may be told again
        assert finish(server, cut)["state"] == "succeeded"
        assert finish(server, waiting)["state"] == "succeeded"
        # The same examples and seed: an interrupted fit ends where an undisturbed one does.
        assert generation(server, "cut") == expected
        assert list((tmp_path / "fits").iterdir()) == []


def test_kill_9_loses_no_job_and_leaves_no_worker(model_folder: Path, tmp_path: Path) -> None:
    with server_process(model_folder, tmp_path, max_fit_tokens=64) as server:
        cut, waiting = submit(server, "cut"), submit(server, "waiting")
        reach(server, cut, step=110)  # two states have been saved
        (worker,) = server.children()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    end = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < end, "the worker outlived its server"
        time.sleep(0.05)
    with server_process(model_folder, tmp_path, max_fit_tokens=64) as server:
        assert first_point(server, cut) >= 100
        assert finish(server, cut)["state"] == "succeeded"
        assert finish(server, waiting)["state"] == "succeeded"
        assert generation(server, "cut") == generation(server, "waiting")
