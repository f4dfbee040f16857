"""Over HTTP: a task's history, going back in it, deleted tasks, the log."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer

SHAPE_OF = "amber"


@pytest.fixture
def task(live: LiveServer) -> Iterator[str]:
    live.client.post("/tasks", json={"id": "aged", "copy_of": SHAPE_OF}).raise_for_status()
    yield "aged"
    live.client.delete("/tasks/aged")


def put(live: LiveServer, task: str, **body: Any) -> str:
    answer = live.client.put(f"/tasks/{task}", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generation"])


def text(live: LiveServer, task: str) -> str:
    return str(live.generate(task=task, temperature=0)["choices"][0]["text"])


def test_rolling_back_serves_what_was_served_before(live: LiveServer, task: str) -> None:
    first = live.client.get(f"/tasks/{task}").json()
    before = text(live, task)
    second = put(live, task, copy_of="birch")
    assert text(live, task) != before  # a control: the two answer differently
    versions = live.client.get(f"/tasks/{task}/history").json()["versions"]
    assert [(v["generation"], v["ended"]) for v in versions] == [
        (second, None),
        (first["generation"], "replaced"),
    ]
    path, body = f"/tasks/{task}/rollback", {"generation": first["generation"]}
    stale = live.client.post(path, json=body, headers={"If-Match": f'"{first["generation"]}"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "stale_generation")
    back = live.client.post(path, json=body, headers={"If-Match": f'"{second}"'})
    assert back.status_code == 200
    assert back.headers["ETag"] == f'"{first["generation"]}"'
    assert text(live, task) == before
    unknown = live.client.post(path, json={"generation": "0" * 64})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_generation")
    wrong = live.client.post(path, json={"to": 1})
    assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "generation")


def test_a_deleted_task_answers_again_once_restored(live: LiveServer, task: str) -> None:
    before = text(live, task)
    taken = live.client.post(f"/tasks/{task}/restore")
    assert (taken.status_code, taken.json()["code"]) == (409, "task_exists")
    live.client.delete(f"/tasks/{task}").raise_for_status()
    gone = live.client.post("/generate", json={"task": task, "prompt": "x"})
    assert (gone.status_code, gone.json()["code"]) == (404, "unknown_task")
    assert live.client.get(f"/tasks/{task}/history").status_code == 404
    assert live.client.post(f"/tasks/{task}/restore").json()["id"] == task
    assert text(live, task) == before
    assert live.client.post("/tasks/never-was/restore").status_code == 404


def test_the_log_tells_every_change(live: LiveServer, task: str) -> None:
    put(live, task, copy_of="birch")
    live.client.patch(f"/tasks/{task}", json={"metadata": {"a": 1}}).raise_for_status()
    live.client.delete(f"/tasks/{task}").raise_for_status()
    page = live.client.get("/audit", params={"task": task, "limit": 3}).json()
    assert [entry["action"] for entry in page["entries"]] == ["deleted", "edited", "replaced"]
    rest = live.client.get("/audit", params={"task": task, "cursor": page["next"]}).json()
    assert rest["entries"][0]["action"] == "copied"
    assert live.client.get("/audit", params={"cursor": "?"}).status_code == 422


def test_a_routing_may_be_stored_in_half_precision(live: LiveServer) -> None:
    shape = live.client.get("/inventory").json()
    rng = random.Random(0)
    logits = [[rng.gauss(0, 1) for _ in range(shape["skills"])] for _ in range(shape["heads"])]
    routing = {"logits": logits, "granularity": "model", "precision": "float16"}
    try:
        made = live.client.post("/tasks", json={"id": "half", "routing": routing})
        assert made.status_code == 201, made.text
        kept = live.client.get("/tasks/half/routing").content
        again = live.client.put(
            "/tasks/half",
            files={"routing": ("r", kept)},
            data={"task": "{}"},
        )
        assert again.json()["generation"] == made.json()["generation"]
        whole = {**routing, "precision": "float32"}
        other = live.client.put("/tasks/half", json={"routing": whole})
        assert other.json()["generation"] != made.json()["generation"]
        routing["logits"] = [[1e6] * shape["skills"]] * shape["heads"]
        large = live.client.put("/tasks/half", json={"routing": routing})
        assert (large.status_code, large.json()["code"]) == (422, "invalid_routing")
    finally:
        live.client.delete("/tasks/half")
