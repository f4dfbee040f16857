"""Two server processes on one PostgreSQL answer as one."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PostgresServer
from server_process import ServerProcess, server_process

Pair = tuple[ServerProcess, ServerProcess]


@pytest.fixture(scope="module")
def pair(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory, postgresql: PostgresServer
) -> Iterator[Pair]:
    url = postgresql.new_database()
    folder = tmp_path_factory.mktemp("two")
    changes: dict[str, Any] = {"database_url": url, "max_fit_tokens": 64}
    with contextlib.ExitStack() as stack:
        one, other = (
            stack.enter_context(server_process(model_folder, folder / name, **changes))
            for name in ("one", "other")
        )
        yield one, other


def say(server: ServerProcess, task: str) -> dict[str, Any] | None:
    """What the task answers, None where the server does not know it."""
    body = {"task": task, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = server.client.post("/generate", json=body)
    if answer.status_code == 404:
        return None
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def copy(server: ServerProcess, task: str, source: str, *, new: bool = False) -> str:
    body = {"copy_of": source}
    if new:
        answer = server.client.post("/tasks", json={"id": task, **body})
    else:
        answer = server.client.put(f"/tasks/{task}", json=body)
    answer.raise_for_status()
    return str(answer.json()["generation"])


def until(server: ServerProcess, task: str, generation: str | None) -> float:
    """Seconds until the server answers for the task at this generation; None is not at all."""
    began = time.monotonic()
    while True:
        found = say(server, task)
        if (found and found["generation"]) == generation:
            return time.monotonic() - began
        assert time.monotonic() - began < 10


def test_what_one_registers_replaces_and_deletes_the_other_serves_within_a_second(
    pair: Pair,
) -> None:
    took = []
    for number in range(5):
        one, other = pair if number % 2 else pair[::-1]
        task = f"shared-{number}"
        took.append(until(other, task, copy(one, task, "amber", new=True)))
        took.append(until(other, task, copy(one, task, "birch")))
        one.client.delete(f"/tasks/{task}").raise_for_status()
        took.append(until(other, task, None))
    assert max(took) < 1.0


def test_a_replaced_task_is_never_a_mix(pair: Pair) -> None:
    """Every answer is that of the generation it names, while the other server replaces the task."""
    one, other = pair
    copy(one, "flips", "amber", new=True)
    sources = ("amber", "birch", "coral")
    answers = {}
    for source in sources:
        until(other, "flips", copy(one, "flips", source))
        found = say(other, "flips")
        assert found is not None
        answers[found["generation"]] = found["choices"][0]["text"]
    assert len(set(answers.values())) > 1  # a control: a mix could be told from a whole
    ended = threading.Event()

    def replace() -> None:
        for source in itertools.cycle(sources):
            if ended.is_set():
                return
            copy(one, "flips", source)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = set()
        for _ in range(60):
            found = say(other, "flips")
            assert found is not None
            assert found["choices"][0]["text"] == answers[found["generation"]]
            seen.add(found["generation"])
        assert len(seen) > 1
    finally:
        ended.set()
        writer.join()


@pytest.mark.skipif(
    "TEST_CRASH_ROUNDS" not in os.environ, reason="takes a minute: a part of `make crash`"
)
def test_a_fit_is_run_by_one_server_and_taken_over_when_that_dies(
    model_folder: Path, tmp_path: Path, postgresql: PostgresServer
) -> None:
    url = postgresql.new_database()
    examples = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
    fit = {"method": "z", "steps": 4000, "holdout": 0.25, "seed": 3}
    changes: dict[str, Any] = {"database_url": url, "max_fit_tokens": 64}
    with server_process(model_folder, tmp_path / "one", **changes) as one:
        body = {"id": "fitted", "examples": examples, "fit": fit}
        job = one.client.post("/tasks", json=body).json()["id"]

        def state(server: ServerProcess) -> tuple[str, int]:
            found = server.client.get(f"/jobs/{job}").json()
            return found["state"], found["progress"]["step"]

        end = time.monotonic() + 60
        while state(one)[1] == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        with server_process(model_folder, tmp_path / "other", **changes) as other:
            assert state(other)[0] == "running"  # starting did not queue it again
            assert other.children() == []
            os.kill(one.process.pid, signal.SIGKILL)
            end = time.monotonic() + 120
            while (now := state(other)[0]) in ("queued", "running"):
                assert time.monotonic() < end, "nobody took the job over"
                time.sleep(0.1)
            assert now == "succeeded"
            assert say(other, "fitted") is not None
