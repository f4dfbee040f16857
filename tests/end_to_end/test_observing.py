"""What can be seen of a live server: metrics, log lines, traces."""

import gzip
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, serving, settings_for
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from polyhead.server.logs import JsonLines

SECRET = "a prompt that nobody else may read"


def samples(server: LiveServer) -> dict[tuple[str, str], float]:
    """By name and first label's value."""
    text = server.client.get("/metrics").text
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_a_request_does_is_counted(live: LiveServer) -> None:
    before = samples(live)
    live.generate(task="amber", max_tokens=8)
    live.generate(task="birch", max_tokens=4, n=2)
    live.client.post("/generate", json={"task": "nobody", "prompt": "x"})

    def grown() -> dict[tuple[str, str], float]:
        now = samples(live)
        return {key: now[key] - before.get(key, 0.0) for key in now}

    live.eventually(lambda: grown()["polyhead_e2e_request_latency_seconds_count", ""] == 2)
    found = grown()
    assert found["polyhead_generation_tokens_total", ""] == 16
    assert found["polyhead_prompt_tokens_total", ""] == 10
    assert found["polyhead_request_success_total", "length"] == 3
    assert found["polyhead_request_refusals_total", "unknown_task"] == 1
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        assert found[f"polyhead_{name}_seconds_count", ""] == 2
    assert found["polyhead_inter_token_latency_seconds_count", ""] == 7 + 3 + 3
    assert found["polyhead_task_requests_total", "amber"] == 1
    assert found["polyhead_task_generation_tokens_total", "birch"] == 8
    steps = found["polyhead_step_seconds_count", ""]
    assert steps >= 8
    forms = [found["polyhead_adapter_form_tasks_total", form] for form in ("combined", "factored")]
    assert sum(forms) == found["polyhead_step_tasks_sum", ""]
    phases = ("schedule", "forward", "sample", "publish")
    spent = sum(found["polyhead_step_phase_seconds_total", phase] for phase in phases)
    assert spent == pytest.approx(found["polyhead_step_seconds_sum", ""])
    assert samples(live)["polyhead_registry_up", ""] == 1


def test_the_gateways_gauge_names_who_runs(live: LiveServer) -> None:
    answer = live.start(task="amber", max_tokens=400)
    lines = live.client.get("/metrics").text.splitlines()
    gauge = next(line for line in lines if line.startswith("polyhead_lora_requests_info{"))
    assert 'running_lora_adapters="amber"' in gauge
    assert answer.result(30).status_code == 200


def test_a_clients_id_and_the_generation_are_in_answer_and_log(
    live: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"task": "amber", "prompt": SECRET, "max_tokens": 2}
    answer = live.client.post("/generate", json=body, headers={"X-Request-Id": "trace-me:1"})
    assert answer.headers["x-request-id"] == "trace-me:1"
    assert answer.headers["x-task-generation"] == answer.json()["generation"]

    def lines() -> list[dict[str, Any]]:
        told = [json.loads(JsonLines().format(record)) for record in caplog.records]
        return [line for line in told if line.get("request_id") == "trace-me:1"]

    live.eventually(lambda: bool(lines()))
    (line,) = lines()
    assert line["generation"] == answer.json()["generation"]
    assert line["answer_id"] == answer.json()["id"]
    assert (line["task"], line["completion_tokens"]) == ("amber", 2)
    assert SECRET not in caplog.text
    assert "prompt" not in line


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_said_is_logged_only_where_that_is_asked_for(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(settings_for(model_folder, tmp_path, log_prompts=asked)) as server:
        server.generate(prompt=SECRET)
        chat = {"model": "amber", "prompt": SECRET, "max_tokens": 2, "stream": True}
        assert server.client.post("/v1/completions", json=chat).is_success
        wrong = {"task": "amber", "prompt": SECRET, "temperature": "hot"}
        assert server.client.post("/generate", json=wrong).status_code == 422
        ended = [record for record in caplog.records if record.message == "request ended"]
        server.eventually(lambda: len(ended) == 2)
    told = [json.loads(JsonLines().format(record)) for record in ended]
    assert [line.get("prompt") for line in told] == ([SECRET] * 2 if asked else [None] * 2)
    assert (SECRET in "\n".join(JsonLines().format(r) for r in caplog.records)) == asked


def test_an_ill_formed_id_is_not_taken(live: LiveServer) -> None:
    answer = live.client.get("/health/live", headers={"X-Request-Id": 'x" y'})
    assert answer.headers["x-request-id"] != 'x" y'


class Collector:
    """A small OTLP receiver: keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.url = ""

    def named(self, name: str) -> Span:
        return next(span for span in self.spans if span.name == name)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                data = gzip.decompress(data)
            request = ExportTraceServiceRequest.FromString(data)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found.spans += scope.spans
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the test's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield found
        server.shutdown()
        thread.join()


def test_a_request_is_a_trace_within_its_clients(
    model_folder: Path, tmp_path: Path, collector: Collector
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    settings = settings_for(model_folder, tmp_path, otlp_endpoint=collector.url)
    with serving(settings) as server:
        body = {"task": "amber", "prompt": SECRET, "max_tokens": 4, "ignore_eos": True}
        headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine"}
        answer = server.client.post("/generate", json=body, headers=headers)
        generation = answer.json()["generation"]
    request = collector.named("text_completion amber")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (trace, parent)
    values = {attribute.key: attribute.value for attribute in request.attributes}
    assert values["gen_ai.request.model"].string_value == "amber"
    assert values["polyhead.task.generation"].string_value == generation
    assert values["polyhead.request.id"].string_value == "mine"
    assert values["gen_ai.usage.output_tokens"].int_value == 4
    assert [event.name for event in request.events] == ["gen_ai.first_token"]
    parts = [collector.named(name) for name in ("queue", "prefill", "decode")]
    assert {part.parent_span_id for part in parts} == {request.span_id}
    moments = [part.start_time_unix_nano for part in parts] + [parts[-1].end_time_unix_nano]
    assert moments == sorted(moments)
    assert SECRET.encode() not in b"".join(span.SerializeToString() for span in collector.spans)
