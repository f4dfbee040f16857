"""Fitting over HTTP with the real worker: from examples to a task that answers."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import tiny_t5
from live_server import LiveServer, serving, settings_for, write_model

EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
QUICK = {"method": "z", "steps": 4, "holdout": 0.25}
LONG = {"method": "z", "steps": 10_000, "holdout": 0.25}


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


def running(live: LiveServer, job_id: str, step: int = 1, seconds: float = 90) -> dict[str, Any]:
    """The job once it has come to `step`."""
    end = time.monotonic() + seconds
    while (found := job(live, job_id))["progress"]["step"] < step:
        assert found["state"] in ("queued", "running"), found
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


def test_a_refit_makes_a_new_generation_and_the_old_one_serves_meanwhile(
    fitting: LiveServer,
) -> None:
    old = fitting.client.get("/tasks/amber").json()
    first = refit(fitting, "amber", fit={**QUICK, "steps": 30}, template="Q {input} A ")
    assert fitting.generate(task="amber")["generation"] == old["generation"]
    assert ended(fitting, first["id"])["state"] == "succeeded"
    new = fitting.client.get("/tasks/amber").json()
    assert new["generation"] != old["generation"]
    assert new["template"] == "Q {input} A "
    assert fitting.generate(task="amber")["generation"] == new["generation"]
    second = refit(fitting, "amber", fit={**QUICK, "method": "lora", "seed": 5})
    assert ended(fitting, second["id"])["result"]["method"] == "lora"
    newest = fitting.client.get("/tasks/amber").json()
    assert (newest["kind"], newest["template"]) == ("private", "Q {input} A ")


def test_events_tell_the_curve_and_end_with_the_job(fitting: LiveServer) -> None:
    options = {"method": "z", "steps": 12, "prompted": True}
    path = "/tasks/birch/fit?holdout=0.5"
    answer = fitting.client.post(path, json={"examples": EXAMPLES, "fit": options})
    assert answer.status_code == 202, answer.text
    events = follow(fitting, answer.json()["id"])
    names = [name for name, _ in events]
    assert names[0] == "job"
    assert names[-2:] == ["job", "done"]
    points = [data for name, data in events if name == "progress"]
    assert [p["step"] for p in points] == sorted(p["step"] for p in points)
    assert points[-1]["step"] > 2
    assert all(p["method"] == "z" and p["loss"] > 0 for p in points)
    assert 0 <= points[-1]["score"] <= 1
    assert points[2]["seconds_left"] >= 0
    final = events[-2][1]
    assert final == job(fitting, final["id"])
    assert final["state"] == "succeeded"
    assert {m["method"] for m in final["result"]["methods"]} == {"z", "prompted"}
    assert 0 <= final["result"]["prompted_score"] <= 1
    late = follow(fitting, final["id"])
    assert late[-2:] == [("job", final), ("done", None)]


def test_jobs_that_wait_are_fitted_together(fitting: LiveServer) -> None:
    blocker = submit(fitting, id="blocker", fit=LONG)
    running(fitting, blocker["id"])
    ids = [submit(fitting, id=f"together-{n}")["id"] for n in range(3)]
    assert {job(fitting, job_id)["state"] for job_id in ids} == {"queued"}
    fitting.client.post(f"/jobs/{blocker['id']}/cancel")
    assert {ended(fitting, job_id)["state"] for job_id in ids} == {"succeeded"}
    batches = {fitting.service.jobs.get(job_id).batch for job_id in ids}
    assert len(batches) == 1
    assert batches != {fitting.service.jobs.get(blocker["id"]).batch}
    assert fitting.client.get("/tasks?prefix=together-").json()["next"] is None
    assert len(fitting.client.get("/tasks?prefix=together-").json()["tasks"]) == 3


def test_a_running_job_is_cancelled_and_the_lane_goes_on(fitting: LiveServer) -> None:
    before = fitting.client.get("/tasks/coral").json()
    doomed = refit(fitting, "coral", fit=LONG)
    running(fitting, doomed["id"])
    answer = fitting.client.post(f"/jobs/{doomed['id']}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert fitting.client.post(f"/jobs/{doomed['id']}/cancel").status_code == 200
    assert follow(fitting, doomed["id"])[-2][1]["state"] == "cancelled"
    assert ended(fitting, refit(fitting, "coral")["id"])["state"] == "succeeded"
    assert fitting.client.get("/tasks/coral").json() != before


def test_a_task_that_was_replaced_meanwhile_keeps_its_new_version(fitting: LiveServer) -> None:
    fitting.client.post("/tasks", json={"id": "contested", "copy_of": "amber"})
    slow = refit(fitting, "contested", fit={**LONG, "steps": 100})
    running(fitting, slow["id"])
    put = fitting.client.put("/tasks/contested", json={"copy_of": "birch"})
    assert put.status_code == 200
    done = ended(fitting, slow["id"])
    assert done["state"] == "failed"
    assert "changed while it was being fitted" in done["error"]
    kept = fitting.client.get("/tasks/contested").json()
    assert kept["generation"] == put.json()["generation"]


def test_a_worker_that_is_killed_costs_one_new_start_and_then_the_job(fitting: LiveServer) -> None:
    doomed = submit(fitting, id="doomed", fit=LONG)
    for _ in range(2):
        running(fitting, doomed["id"])
        pid = fitting.service.lane.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        fitting.eventually(lambda dead=pid: fitting.service.lane.worker_pid != dead, 30)
        assert fitting.generate()["choices"]
        if job(fitting, doomed["id"])["state"] != "failed":
            fitting.eventually(lambda: job(fitting, doomed["id"])["state"] == "running", 30)
    done = ended(fitting, doomed["id"])
    assert done["state"] == "failed"
    assert "SIGKILL" in done["error"]
    assert fitting.client.get("/tasks/doomed").status_code == 404
    assert ended(fitting, submit(fitting, id="after")["id"])["state"] == "succeeded"
    metrics = fitting.client.get("/metrics").text
    assert "polyhead_fit_worker_deaths_total 2.0" in metrics
    assert 'polyhead_fit_jobs_total{state="failed"}' in metrics
    assert "polyhead_fit_jobs_running 0.0" in metrics


def example(place: int, **changes: str) -> list[dict[str, str]]:
    return [{**e, **(changes if n == place else {})} for n, e in enumerate(EXAMPLES)]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"examples": []}, "examples"),
        ({"examples": example(3, output="")}, "examples[3].output"),
        ({"examples": example(5, input=" ")}, "examples[5].input"),
        ({"examples": example(2, input="n0", output="z")}, "examples[2].output"),
        ({"examples": example(1, input="x" * 64)}, "examples[1]"),
        ({"examples": [*EXAMPLES[:2], {"input": "n9"}]}, "examples[2].output"),
        ({"examples": [*EXAMPLES[:2], {"input": "n9", "output": 3}]}, "examples[2].output"),
        ({"examples": EXAMPLES * 65}, "examples[512]"),
        ({"template": "{input} and {input}"}, "template"),
        ({"fit": {"method": "magic"}}, "fit.method"),
        ({"fit": {"holdout": 1.0}}, "fit.holdout"),
        ({"fit": {"holdout": 0.2, "folds": 3}}, "fit.folds"),
        ({"fit": {"method": "lora", "warm_start": True}}, "fit.warm_start"),
        ({"fit": {"steps": 0}}, "fit.steps"),
        ({"routing": {"logits": []}}, "examples"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_stored(
    fitting: LiveServer, body: dict[str, Any], field: str
) -> None:
    before = fitting.service.jobs.counts()
    whole = {"id": "never", "examples": EXAMPLES} | body
    answer = fitting.client.post("/tasks", json=whole)
    assert answer.status_code == 422, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert fitting.service.jobs.counts() == before
    assert fitting.client.get("/tasks/never").status_code == 404


def test_refusals_of_fits_and_jobs(fitting: LiveServer) -> None:
    client, body = fitting.client, {"examples": EXAMPLES}
    cases = [
        (client.post("/tasks", json={"id": "amber", **body}), 409, "task_exists"),
        (client.post("/tasks", json={"id": "base", **body}), 422, "reserved_id"),
        (client.post("/tasks", json=body), 422, "invalid_value"),
        (client.post("/tasks", json={"id": "x", "copy_of": "amber", "fit": {}}), 422, None),
        (client.post("/tasks?holdout=0.2", json={"id": "x", "copy_of": "amber"}), 422, None),
        (client.put("/tasks/amber", json=body), 422, "invalid_value"),
        (client.post("/tasks/nobody/fit", json=body), 404, "unknown_task"),
        (client.post("/tasks/base/fit", json=body), 404, "unknown_task"),
        (
            client.post("/tasks/amber/fit", json=body, headers={"If-Match": '"0"'}),
            412,
            "stale_generation",
        ),
        (client.post("/tasks/amber/fit?holdout=2", json=body), 422, "invalid_value"),
        (
            client.post("/tasks/amber/fit?holdout=0.5", json={**body, "fit": {"folds": 3}}),
            422,
            "invalid_value",
        ),
        (client.get("/jobs/nobody"), 404, "unknown_job"),
        (client.get("/jobs/nobody/events"), 404, "unknown_job"),
        (client.post("/jobs/nobody/cancel"), 404, "unknown_job"),
        (client.get("/jobs?state=odd"), 422, "invalid_value"),
    ]
    for number, (answer, status, code) in enumerate(cases):
        assert answer.status_code == status, (number, answer.text)
        assert code in (None, answer.json()["code"]), number
    assert client.get("/tasks/x").status_code == 404


def test_jobs_are_listed_newest_first(fitting: LiveServer) -> None:
    ids = [submit(fitting, id=f"listed-{n}")["id"] for n in range(2)]
    for job_id in ids:
        ended(fitting, job_id)
    page = fitting.client.get("/jobs?limit=2").json()
    assert [found["id"] for found in page["jobs"]] == ids[::-1]
    rest = fitting.client.get(f"/jobs?limit=1&cursor={page['next']}").json()["jobs"]
    assert rest[0]["id"] < ids[0]
    own = fitting.client.get("/jobs?task=listed-1&state=succeeded").json()
    assert own == {"jobs": [job(fitting, ids[1])], "next": None}
    again = fitting.client.post(f"/jobs/{ids[0]}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "job_ended")


def test_a_worker_without_work_goes(model_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model_folder, tmp_path, max_fit_tokens=64, fit_idle_seconds=0.3)
    with serving(settings) as own:
        assert own.service.lane.worker_pid is None
        assert ended(own, submit(own, id="a")["id"])["state"] == "succeeded"
        own.eventually(lambda: own.service.lane.worker_pid is None, 20)
        assert list((tmp_path / "fits").iterdir()) == []


def answers_of(live: LiveServer, task: str) -> list[dict[str, str]]:
    """What a task says itself, as examples of it: answers whose text has their very tokens."""
    found = []
    for number in range(200):
        body = {"task": task, "input": f"n{number}", "max_tokens": 3, "return_token_ids": True}
        (choice,) = live.client.post("/generate", json=body).json()["choices"]
        text = choice["text"]
        if text.strip() and list(text.encode()) == choice["token_ids"]:
            found.append({"input": f"n{number}", "output": text})
        if len(found) == 8:
            return found
    raise AssertionError(f"{task} writes no text")


def test_a_warm_start_begins_from_the_task_that_answers_so(
    model_folder: Path, tmp_path: Path
) -> None:
    """On a server of its own: once others are fitted, its tasks are not the inventory's."""
    with serving(settings_for(model_folder, tmp_path, max_fit_tokens=64)) as own:
        for near in ("amber", "coral"):
            asked = {"id": f"like-{near}", "examples": answers_of(own, near)}
            done = ended(own, submit(own, **asked, fit=QUICK | {"warm_start": True})["id"])
            assert done["state"] == "succeeded", done
            assert done["result"]["began_from"][0] == near
            cold = ended(own, refit(own, f"like-{near}", examples=asked["examples"])["id"])
            assert "began_from" not in cold["result"]


def test_an_encoder_decoder_is_fitted_where_it_is_served(tmp_path: Path) -> None:
    """Twice: the second fit's answers differ from those of the first, so it is the task's own."""
    write_model(tmp_path / "t5", tiny_t5("gated-gelu", 2.0, eos_token_id=256, pad_token_id=0))
    with serving(settings_for(tmp_path / "t5", tmp_path / "data", max_fit_tokens=64)) as server:
        answers = []
        for letter in "ab":
            examples = [{"input": f"n{number}", "output": letter * 3} for number in range(8)]
            how = {"method": "lora", "steps": 40, "rate": 0.02, "holdout": 0.25}
            job = submit(server, id=f"always-{letter}", examples=examples, fit=how)
            done = ended(server, job["id"])
            assert done["state"] == "succeeded", done
            asked = {"task": f"always-{letter}", "input": "n3", "max_tokens": 3}
            answers.append(server.client.post("/generate", json=asked).json()["choices"][0]["text"])
        assert answers == ["aaa", "bbb"]
