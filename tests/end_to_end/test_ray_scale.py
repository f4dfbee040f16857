"""Two replicas on two machines behind one gateway: one registry, tasks that keep to their replica,
and a machine that is lost amid answers."""

import concurrent.futures
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_server import TASKS
from postgres_server import PostgresServer
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import RayCluster, ray_cluster

pytest.importorskip("ray", reason="Ray is not installed: pip install polyhead[scale]")

LONG = 160
STREAMS = 8


@pytest.fixture(scope="module")
def cluster(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory, postgresql: PostgresServer
) -> Iterator[RayCluster]:
    url = postgresql.new_database()
    with ray_cluster(model_folder, tmp_path_factory.mktemp("ray"), database_url=url) as found:
        yield found


def body(task: str, tokens: int = 8, **more: Any) -> dict[str, Any]:
    asked = {"task": task, "prompt": "hello", "max_tokens": tokens, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **more}


def whole(cluster: RayCluster, task: str, tokens: int = 8) -> tuple[str, list[int]]:
    """The replica that answered, and the tokens."""
    answer = cluster.client.post("/generate", json=body(task, tokens))
    assert answer.status_code == 200, answer.text
    return answer.headers["x-replica"], answer.json()["choices"][0]["token_ids"]


@dataclass
class Streamed:
    """What came of a stream before it ended, and how it ended."""

    replica: str
    tokens: list[int]
    ending: str


def streamed(cluster: RayCluster, task: str, started: Any = None) -> Streamed:
    found = Streamed("", [], "broken off")
    asked = body(task, LONG, stream=True)
    with cluster.client.stream("POST", "/generate", json=asked, timeout=90) as answer:
        assert answer.status_code == 200, answer.read()
        found.replica = answer.headers["x-replica"]
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if line == "event: error":
                found.ending = "error"
            elif data == "[DONE]":
                found.ending = "done"
            elif line.startswith("data: "):
                event = json.loads(data)
                found.tokens += event.get("token_ids", [])
                if event.get("code") is not None:
                    found.ending = event["code"]
            if started is not None and found.tokens:
                started.release()
                started = None
    return found


def test_a_task_keeps_to_its_replica_and_tasks_use_both(cluster: RayCluster) -> None:
    homes: dict[str, set[str]] = {}
    for number in range(12):
        task = f"copy-{number}"
        made = cluster.client.post("/tasks", json={"id": task, "copy_of": TASKS[number % 3]})
        assert made.status_code == 201, made.text
        homes[task] = {whole(cluster, task)[0] for _ in range(4)}
    assert all(len(found) == 1 for found in homes.values())
    assert len(set.union(*homes.values())) == 2


def test_both_replicas_answer_alike_and_tasks_differ(cluster: RayCluster) -> None:
    answers = {name: {tuple(whole(cluster, name)[1])} for name in TASKS}
    for number in range(12):
        original = TASKS[number % 3]
        answers[original].add(tuple(whole(cluster, f"copy-{number}")[1]))
    assert all(len(found) == 1 for found in answers.values())
    assert len(set.union(*answers.values())) == 3


def test_a_refusal_passes_through_unchanged(cluster: RayCluster) -> None:
    answer = cluster.client.post("/generate", json=body("nobody"))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "unknown_task"


def test_metrics_are_those_of_every_replica(cluster: RayCluster) -> None:
    homes = {whole(cluster, f"copy-{number}")[0] for number in range(12)}
    answer = cluster.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    counted = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == "polyhead_prompt_tokens_total"
    }
    assert counted.keys() == homes
    assert len(homes) == 2
    assert min(counted.values()) > 0


def test_a_lost_machine_breaks_no_answer_silently(cluster: RayCluster) -> None:
    """Streams end whole, or with an error in them; what has not begun is answered elsewhere."""

    right = {name: whole(cluster, name, LONG)[1] for name in TASKS}
    started = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(2 * STREAMS) as pool:
        tasks = [f"copy-{number}" for number in range(STREAMS)]
        streams = [pool.submit(streamed, cluster, task, started) for task in tasks]
        for _ in streams:
            assert started.acquire(timeout=60)
        calls = [pool.submit(whole, cluster, f"copy-{n}", LONG) for n in range(STREAMS)]
        cluster.tell("lose")
        found = [stream.result(120) for stream in streams]
        answers = [call.result(120) for call in calls]
    cluster.done()
    for number, stream in enumerate(found):
        tokens = right[TASKS[number % 3]]
        assert stream.ending in ("done", "replica_lost")
        assert stream.tokens == tokens[: len(stream.tokens)]
        assert (stream.ending == "done") == (len(stream.tokens) == LONG)
    for number, (_, tokens) in enumerate(answers):
        assert tokens == right[TASKS[number % 3]]
    assert {stream.ending for stream in found} == {"done", "replica_lost"}
    survivors = {stream.replica for stream in found if stream.ending == "done"}
    assert {whole(cluster, f"copy-{number}")[0] for number in range(12)} == survivors


def test_taking_the_application_down_finishes_what_runs(cluster: RayCluster) -> None:

    started = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(streamed, cluster, "amber", started)
        assert started.acquire(timeout=60)
        cluster.tell("drain")
        assert stream.result(60).ending == "done"
    cluster.done()
