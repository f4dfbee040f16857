"""The time of day jumps while the server runs: nothing ends early, nothing waits for ever."""

import concurrent.futures
import itertools
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from live_server import CONTEXT
from server_process import ServerProcess, server_process

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
BODY = {"task": "amber", "prompt": "x", "ignore_eos": True, "deadline": 60}


class Clock:
    """The server's time of day, as an offset that the library reads anew once a second."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.move("+0")

    def move(self, offset: str) -> None:
        self._file.write_text(f"{offset}\n")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


def jump(server: ServerProcess, clock: Clock, days: int) -> None:
    """Move the server's clock, and wait until tasks are registered at that time."""
    clock.move(f"{days:+}d")
    end = time.monotonic() + 10
    for number in itertools.count():
        made = server.client.post("/tasks", json={"id": f"made{days}-{number}", "copy_of": "amber"})
        assert made.status_code == 201, made.text
        there = datetime.fromisoformat(made.json()["created_at"])
        if abs((there - datetime.now(UTC)).total_seconds() / 86400 - days) < 0.1:
            return
        assert time.monotonic() < end, "the clock did not jump"
        time.sleep(0.1)


def stream(server: ServerProcess) -> list[dict[str, Any]]:
    """A long answer with a deadline, as its events."""
    body = {**BODY, "max_tokens": CONTEXT - 1, "n": 2, "stream": True}
    with server.client.stream("POST", "/generate", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed")
def test_jumps_of_the_clock_end_nothing(model_folder: Path, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "offset")
    with (
        server_process(model_folder, tmp_path, clock.environment, max_fit_tokens=64) as server,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        fit = {"method": "z", "steps": 10_000, "holdout": 0.25}
        fitted = server.client.post("/tasks", json={"id": "t", "examples": EXAMPLES, "fit": fit})
        job = f"/jobs/{fitted.json()['id']}"
        end = time.monotonic() + 60
        while server.client.get(job).json()["progress"]["step"] < 1:
            assert time.monotonic() < end
            time.sleep(0.1)
        for days in (400, -3):
            began = server.client.get(job).json()["progress"]["step"]
            running = pool.submit(stream, server)
            jump(server, clock, days)
            events = running.result(60)
            reasons = [event.get("finish_reason") for event in events]
            assert reasons.count("length") == 2
            assert server.client.post("/generate", json={**BODY, "max_tokens": 4}).is_success
            assert server.client.get("/health/ready").status_code == 200
            end = time.monotonic() + 30
            while (found := server.client.get(job).json())["progress"]["step"] <= began:
                assert found["state"] == "running"
                assert time.monotonic() < end
                time.sleep(0.1)
        assert found["state"] == "running"
        late = server.client.post("/generate", json={**BODY, "max_tokens": 400, "deadline": 0.01})
        assert "deadline" in late.text  # and true deadlines still end
