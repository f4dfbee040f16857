"""A T5 served over HTTP: the calls of every server, answered from encoded sources."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from factories import merged, random_private, restless_t5
from live_server import CONTEXT, TASKS, LiveServer, serving, settings_for, write_model
from transformers import PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.clients import Client

END = 256


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("t5")
    write_model(folder, restless_t5(eos_token_id=END))
    settings = settings_for(folder, folder / "data", max_context=CONTEXT, max_running=6)
    with serving(settings) as server:
        yield server


@pytest.fixture(scope="module")
def references(t5: LiveServer) -> dict[str, PreTrainedModel]:
    """Every task's merged model."""
    torch.set_num_threads(1)
    inventory = Inventory.load(t5.service.settings.inventory)
    adapters: dict[str, Adapter] = {
        name: RoutedTask(name, inventory.tasks[name].weights(inventory.layout)) for name in TASKS
    }
    bare = restless_t5(eos_token_id=END)
    return {name: merged(bare, inventory, a) for name, a in {**adapters, "base": None}.items()}


def ids(text: str) -> list[int]:
    return [*text.encode(), END]


def answer(model: PreTrainedModel, text: str, tokens: int) -> list[int]:
    source = torch.tensor([ids(text)])
    found = model.generate(
        source,
        attention_mask=torch.ones_like(source),
        do_sample=False,
        max_new_tokens=tokens,
    )
    return [int(token) for token in found[0, 1:]]


def test_a_mixed_batch_answers_as_each_merged_model_alone(
    t5: LiveServer, references: dict[str, PreTrainedModel]
) -> None:
    """More requests than seats, of all lengths: they join and leave while others decode."""
    tasks = [*TASKS, "base"]
    asked = [
        (tasks[i % 4], f"what is {i} " + "and so on " * (i % 5 * 3), 3 + 5 * i % 29)
        for i in range(24)
    ]

    def ask(call: tuple[str, str, int]) -> list[int]:
        task, prompt, tokens = call
        body = {"task": task, "prompt": prompt, "max_tokens": tokens, "return_token_ids": True}
        found: list[int] = t5.generate(**body)["choices"][0]["token_ids"]
        return found

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, asked))
    expected = [answer(references[task], prompt, tokens) for task, prompt, tokens in asked]
    assert found == expected
    wrong = [answer(references["base" if t != "base" else "amber"], p, n) for t, p, n in asked]
    assert sum(a != b for a, b in zip(wrong, expected, strict=True)) > 20


def test_text_is_ended_as_the_tokenizer_ends_it_and_ids_are_taken_as_they_are(
    t5: LiveServer,
) -> None:
    whole = t5.generate(prompt="hello")
    assert whole["usage"]["prompt_tokens"] == 6
    assert t5.generate(prompt=ids("hello"))["choices"] == whole["choices"]
    assert t5.generate(prompt=ids("hello")[:-1])["choices"] != whole["choices"]


def test_a_stream_says_what_the_whole_answer_says(t5: LiveServer) -> None:
    whole = t5.generate(prompt="hello", max_tokens=20)
    body = {"task": "amber", "prompt": "hello", "max_tokens": 20, "ignore_eos": True}
    text = t5.client.post("/generate", json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert len(events) > 3
    assert "".join(e["text"] for e in events) == whole["choices"][0]["text"]
    assert events[-1]["usage"]["prompt_tokens"] == 6


def test_an_answer_ends_at_a_stop_string_and_samples_differ(t5: LiveServer) -> None:
    text = t5.generate(max_tokens=40)["choices"][0]["text"]
    stop = text[5:7]
    stopped = t5.generate(max_tokens=40, stop=[stop])["choices"][0]
    assert stopped == {
        "index": 0,
        "text": text[: text.index(stop)],
        "finish_reason": "stop",
    }
    sampled = t5.generate(n=3, temperature=1.0, seed=1, max_tokens=20)
    assert len({choice["text"] for choice in sampled["choices"]}) == 3
    assert sampled == t5.generate(n=3, temperature=1.0, seed=1, max_tokens=20) | {
        "id": sampled["id"],
        "usage": sampled["usage"],
    }


def test_scores_are_those_of_a_plain_loop_over_labels(
    t5: LiveServer, references: dict[str, PreTrainedModel]
) -> None:
    choices = ["yes", "no", "perhaps, but not today", "x"]
    source = torch.tensor([ids("is it so?")])
    for task in ("amber", "birch"):
        body = {"task": task, "prompt": "is it so?", "choices": choices}
        found = t5.client.post("/score", json=body).json()
        labels = [torch.tensor([ids(choice)]) for choice in choices]
        means = [-float(references[task](input_ids=source, labels=g).loss) for g in labels]
        scores = found["scores"]
        assert [s["tokens"] for s in scores] == [gold.shape[1] for gold in labels]
        assert [s["normalised"] for s in scores] == pytest.approx(means, abs=1e-4)
        assert found["best"] == max(range(4), key=lambda i: means[i])
        other = references["coral"]
        wrong = [-float(other(input_ids=source, labels=g).loss) for g in labels]
        assert [s["normalised"] for s in scores] != pytest.approx(wrong, abs=1e-2)


def test_private_adapters_and_inputs_are_served_too(t5: LiveServer) -> None:
    inventory = Inventory.load(t5.service.settings.inventory)
    own = random_private(inventory, 3)
    with Client(t5.url) as client:
        client.tasks.create("own", private_adapter=own.to_safetensors())
    try:
        found = t5.generate(task="own", prompt="hello", return_token_ids=True)
        model = merged(restless_t5(eos_token_id=END), inventory, own)
        assert found["choices"][0]["token_ids"] == answer(model, "hello", 8)
        assert t5.generate(task="own", prompt=None, input="hello")["usage"]["prompt_tokens"] == 6
    finally:
        t5.client.delete("/tasks/own")


def test_openais_completions_answer_alike_and_refuse_an_echo(t5: LiveServer) -> None:
    body = {"model": "amber", "prompt": ["hello", "there"], "max_tokens": 8, "temperature": 0}
    found = t5.client.post("/v1/completions", json=body).json()
    expected = [t5.generate(prompt=p, ignore_eos=False) for p in ("hello", "there")]
    assert [c["text"] for c in found["choices"]] == [e["choices"][0]["text"] for e in expected]
    assert found["usage"]["prompt_tokens"] == 12
    refused = t5.client.post("/v1/completions", json={**body, "echo": True})
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "echo"


def problem(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    return {"field": error["field"], "expected": error["expected"]}


def test_what_is_too_long_is_refused_by_name_and_the_server_goes_on(t5: LiveServer) -> None:
    def refused(call: str, **body: Any) -> dict[str, Any]:
        return problem(t5.client.post(call, json={"task": "amber", **body}))

    most = {"expected": f"at most {CONTEXT - 1} tokens"}
    long = "x" * CONTEXT
    assert refused("/generate", prompt=long) == {"field": "prompt", **most}
    assert refused("/generate", input=long) == {"field": "input", **most}
    asked = refused("/generate", prompt="x", max_tokens=CONTEXT)
    assert asked["field"] == "max_tokens"
    found = refused("/score", prompt="x", choices=["a", long])
    assert found == {"field": "choices[1]", **most}
    longest = t5.generate(prompt="x" * (CONTEXT - 2), max_tokens=CONTEXT - 1)
    assert longest["usage"]["completion_tokens"] == CONTEXT - 1


def test_an_identical_prompt_is_not_encoded_again_until_its_task_is_replaced(
    t5: LiveServer,
) -> None:
    client = t5.client
    client.post("/tasks", json={"id": "warm", "copy_of": "amber"}).raise_for_status()
    try:

        def asked(prompt: str, **body: Any) -> tuple[int, str]:
            found = t5.generate(task="warm", prompt=prompt, **body)
            return found["usage"]["cached_tokens"], found["choices"][0]["text"]

        first = asked("a source that is asked twice")
        again = asked("a source that is asked twice")
        assert (first[0], again[0]) == (0, 29)
        assert first[1] == again[1]
        assert asked("a source that is asked twice, or not")[0] == 0
        client.put("/tasks/warm", json={"copy_of": "birch"}).raise_for_status()
        fresh = asked("a source that is asked twice")
        assert fresh[0] == 0
        right = t5.generate(task="birch", prompt="a source that is asked twice")
        assert fresh[1] == right["choices"][0]["text"] != first[1]
    finally:
        client.delete("/tasks/warm")


def test_the_inventory_says_what_kind_of_backbone_it_is(t5: LiveServer, live: LiveServer) -> None:
    for server, kind in [(t5, "encoder-decoder"), (live, "causal")]:
        with Client(server.url) as client:
            assert client.inventory().kind == kind


def test_deadlines_and_schemas_hold_here_too(t5: LiveServer) -> None:
    late = t5.generate(max_tokens=CONTEXT - 1, deadline=0.02)["choices"][0]
    assert late["finish_reason"] == "deadline"
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    held = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = t5.generate(max_tokens=40, ignore_eos=False, response_format=held)["choices"][0]
    assert json.loads(found["text"])["a"] in (1, 22)
