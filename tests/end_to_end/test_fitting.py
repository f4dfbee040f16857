"""Fitting over HTTP with the real worker: from examples to a task that answers."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, serving, settings_for

EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
QUICK = {"method": "z", "steps": 4, "holdout": 0.25}
LONG = {"method": "z", "steps": 5000, "holdout": 0.25}


@pytest.fixture(scope="module")
def fitting(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose worker is warm after the first fit."""
    data_dir = tmp_path_factory.mktemp("fitting")
    with serving(settings_for(model_folder, data_dir, max_fit_tokens=64)) as server:
        yield server


def submit(live: LiveServer, **body: Any) -> dict[str, Any]:
    """`POST /tasks` from `EXAMPLES`, which must be taken."""
    answer = live.client.post("/tasks", json={"examples": EXAMPLES, "fit": QUICK} | body)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/jobs/{found['id']}"
    return found


def refit(live: LiveServer, task: str, **body: Any) -> dict[str, Any]:
    whole = {"examples": EXAMPLES, "fit": QUICK} | body
    answer = live.client.post(f"/tasks/{task}/fit", json=whole)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def job(live: LiveServer, job_id: str) -> dict[str, Any]:
    answer = live.client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(live: LiveServer, job_id: str, seconds: float = 90) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (found := job(live, job_id))["state"] in ("queued", "running"):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def follow(live: LiveServer, job_id: str) -> list[tuple[str, Any]]:
    """Names and contents of all events."""
    found, name = [], ""
    with live.client.stream("GET", f"/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(("done", None) if data == "[DONE]" else (name, json.loads(data)))
    return found


def test_a_task_comes_to_be_from_examples(fitting: LiveServer) -> None:
    queued = submit(fitting, id="fresh", metadata={"team": "a"}, defaults={"max_tokens": 3})
    assert queued["state"] == "queued"
    assert queued["progress"] == {"step": 0, "steps": 0, "loss": None}
    assert fitting.client.get("/tasks/fresh").status_code == 404
    done = ended(fitting, queued["id"])
    assert done["state"] == "succeeded", done
    assert done["result"]["method"] == "z"
    assert 0 <= done["result"]["score"] <= 1
    assert done["result"]["seconds"] > 0
    task = fitting.client.get("/tasks/fresh").json()
    assert task["generation"] == done["result"]["generation"]
    assert (task["template"], task["metadata"]) == ("{input}\n", {"team": "a"})
    assert task["defaults"] == {"max_tokens": 3}
    assert task["provenance"] == {"how": "fitted", "job": queued["id"], "method": "z"}
    answer = fitting.client.post("/generate", json={"task": "fresh", "input": "n3"})
    assert answer.json()["generation"] == task["generation"]
    assert answer.json()["usage"]["completion_tokens"] <= 3
