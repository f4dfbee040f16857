"""Every expression of every panel and rule is answered, by a Prometheus that scrapes a server."""

import contextlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from live_server import TASKS
from ports import free_port
from server_process import ServerProcess, server_process

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "prometheus" / "rules" / "polyhead.yml"
COMPARED = re.compile(r"\s*(==|>|<)\s*[\d.]+$")
SECONDS = 12
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs: [{{job_name: polyhead, static_configs: [{{targets: ["{target}"]}}]}}]
"""
EXAMPLES = [
    {"input": word, "output": word.upper()} for word in ("ab", "cd", "ef", "gh", "ij", "kl")
]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed: apt-get install prometheus",
)


@pytest.fixture(scope="module")
def dashboards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", DOCKER / "grafana/dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_written_dashboards_are_those_of_the_code(dashboards: ModuleType) -> None:
    for name in dashboards.DASHBOARDS:
        assert (DOCKER / "grafana" / f"{name}.json").read_text() == dashboards.built(name)
    assert (
        len({panel.title for _, panels in dashboards.DASHBOARDS.values() for panel in panels}) > 30
    )


@needs_prometheus
def test_the_rules_tell_what_their_own_tests_say() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", "rules_test.yml"]):
        found = subprocess.run(
            ["promtool", *command], cwd=RULES.parents[1], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout + found.stderr


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    address = f"127.0.0.1:{free_port()}"
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=RULES, target=target))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen([*command, f"--web.listen-address={address}"], **quiet) as process,  # type: ignore[call-overload]
        httpx.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as client,
    ):
        try:
            yield client
        finally:
            process.terminate()


def traffic(server: ServerProcess, stop: threading.Event) -> None:
    """Requests of several tasks that begin alike, and one that is refused, over and over."""
    number = 0
    while not stop.is_set():
        body = {"prompt": "a beginning that all of them share", "max_tokens": 8, "ignore_eos": True}
        server.client.post("/generate", json={**body, "task": TASKS[number % 3]})
        if number % 5 == 0:
            server.client.post("/generate", json={**body, "task": "nobody"})
        number += 1


def answered(client: httpx.Client, expression: str) -> list[float]:
    """The values of an instant query. Raises where Prometheus cannot make sense of it."""
    found: dict[str, Any] = client.post("/api/v1/query", data={"query": expression}).json()
    assert found["status"] == "success", (expression, found)
    return [float(series["value"][1]) for series in found["data"]["result"]]


@pytest.fixture(scope="module")
def scraped(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that has watched a server at work for a while, and still does."""
    folder = tmp_path_factory.mktemp("prometheus")
    stop = threading.Event()
    with (
        server_process(model_folder, folder / "registry", max_fit_tokens=64) as server,
        prometheus(folder, str(server.client.base_url.netloc.decode())) as client,
    ):
        worker = threading.Thread(target=traffic, args=(server, stop))
        worker.start()
        try:
            fit = {"id": "fitted", "examples": EXAMPLES, "fit": {"method": "z", "steps": 5}}
            assert server.client.post("/tasks", json=fit).status_code == 202
            time.sleep(SECONDS)
            yield client
        finally:
            stop.set()
            worker.join()


def expressions(dashboards: ModuleType) -> list[str]:
    panels = [panel for _, panels in dashboards.DASHBOARDS.values() for panel in panels]
    return [query for panel in panels for query in panel.queries.values()]


@needs_prometheus
def test_no_panel_is_empty(dashboards: ModuleType, scraped: httpx.Client) -> None:
    asked = [query.replace("$__rate_interval", "10s") for query in expressions(dashboards)]
    assert len(asked) > 50
    values = {query: answered(scraped, query) for query in asked}
    assert [query for query, found in values.items() if not found] == []
    assert [query for query, found in values.items() if any(map(math.isnan, found))] == []


@needs_prometheus
def test_no_rule_is_empty(scraped: httpx.Client) -> None:
    groups = scraped.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 12
    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        compared = rule["type"] == "alerting"
        query = COMPARED.sub("", rule["query"]) if compared else rule["query"]
        assert not compared or query != rule["query"], "an alert compares with a number"
        found = answered(scraped, query)
        assert found, rule["name"]
        assert not any(map(math.isnan, found)), rule["name"]


@needs_prometheus
def test_a_panel_that_asks_for_what_is_not_there_would_be_found(scraped: httpx.Client) -> None:
    """The control: an unknown metric is empty, and nonsense raises."""
    assert answered(scraped, "polyhead_no_such_metric") == []
    with pytest.raises(AssertionError, match="error"):
        answered(scraped, "sum(")


def test_the_provisioned_folder_holds_the_dashboards() -> None:
    names = {json.loads(path.read_text())["uid"] for path in (DOCKER / "grafana").glob("*.json")}
    assert names == {"polyhead-serving", "polyhead-tasks", "polyhead-capacity"}
