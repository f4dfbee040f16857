"""Tasks from contexts, over a real server whose inventory has a generator."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from factories import byte_tokenizer, restless_t5, tiny_generator, tiny_model
from live_server import CONTEXT, TASKS, LiveServer, serving, settings_for, write_model
from safetensors.torch import load
from torch import Tensor
from typer.testing import CliRunner

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.embedding import embed
from polyhead.clients import Client, UnprocessableError
from polyhead.server.cli import app

DOCUMENT = "cat -> cats\n\ndog -> dogs\n  a much longer line, which no step of sixteen tokens holds"
LINES = ["cat -> cats", "dog -> dogs", "a much longer line, which no step of sixteen tokens holds"]
OTHER = "one, two, three\nfour"
TEMPLATE = "Q {input} A"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder)
    inventory = Inventory.load(folder / "inventory")
    mean = embedding(["hello there"])
    inventory.generator = tiny_generator(inventory, mean, TEMPLATE)
    inventory.save(folder / "inventory")
    settings = settings_for(folder, folder / "data", max_step_tokens=16, max_running=8)
    with serving(settings) as server:
        yield server


@pytest.fixture
def fresh(made: LiveServer) -> Iterator[LiveServer]:
    """The shared server; what the test registers is removed after it."""
    yield made
    for task in made.client.get("/tasks").json()["tasks"]:
        if task["id"] not in TASKS:
            made.client.delete(f"/tasks/{task['id']}")


def embedding(lines: list[str]) -> Tensor:
    """By transformers alone."""
    model = tiny_model(max_position_embeddings=CONTEXT)
    return embed(model, byte_tokenizer(), lines).mean(0)


def by_hand(live: LiveServer, lines: list[str]) -> Tensor:
    """The coefficients, by the definition in float64."""
    g = live.service.inventory.generator
    assert g is not None
    e = (embedding(lines).double() - g.mean.double()) / g.scale.double()
    low = g.right.double() @ e
    return (g.bias.double() + (g.left.double() * low).sum(-1)).float()


def tokens(live: LiveServer, **body: Any) -> Any:
    whole = {"input": "hello", "prompt": None, "max_tokens": 16, "return_token_ids": True} | body
    return live.generate(**whole)["choices"][0]["token_ids"]


def test_a_context_answers_as_its_coefficients_do(fresh: LiveServer) -> None:
    assert fresh.client.get("/inventory").json()["contexts"] is True
    answer = fresh.client.post("/tasks", json={"id": "new", "context": DOCUMENT})
    assert answer.status_code == 201, answer.text
    assert "X-Task-Generation" not in answer.headers, "the bare backbone's, which answers nothing"
    task = answer.json()
    assert (task["kind"], task["routing_kind"], task["granularity"]) == (
        "routing",
        "coefficients",
        "module",
    )
    assert task["template"] == TEMPLATE
    assert task["provenance"] == {
        "how": "generated",
        "texts": 3,
        "tokens": sum(len(line) for line in LINES),
    }
    kept = load(fresh.client.get("/tasks/new/routing").content)["coefficients"]
    wanted = by_hand(fresh, LINES)
    torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-3)
    hand = {"id": "hand", "routing": {"coefficients": wanted.tolist()}, "template": TEMPLATE}
    assert fresh.client.post("/tasks", json=hand).status_code == 201
    assert tokens(fresh, task="new") == tokens(fresh, task="hand")
    other = {"id": "other", "context": OTHER}
    assert fresh.client.post("/tasks", json=other).status_code == 201
    assert tokens(fresh, task="new") != tokens(fresh, task="other")
    assert tokens(fresh, task="new") != tokens(fresh, task="base")


def test_examples_are_the_lines_of_a_document(fresh: LiveServer) -> None:
    examples = [{"input": "cat", "output": "cats"}, {"input": " dog", "output": "dogs"}]
    body = {"id": "new", "context": examples, "template": "{input}", "metadata": {"a": 1}}
    task = fresh.client.post("/tasks", json=body).json()
    assert (task["template"], task["metadata"]) == ("{input}", {"a": 1})
    kept = load(fresh.client.get("/tasks/new/routing").content)["coefficients"]
    torch.testing.assert_close(kept, by_hand(fresh, LINES[:2]), rtol=1e-3, atol=1e-3)
    assert (kept - by_hand(fresh, LINES)).abs().max() > 0.05


def test_a_task_is_replaced_by_a_contexts(fresh: LiveServer) -> None:
    first = fresh.client.post("/tasks", json={"id": "new", "context": OTHER}).json()
    before = tokens(fresh, task="new")
    stale = {"If-Match": '"0000"'}
    refused = fresh.client.put("/tasks/new", json={"context": DOCUMENT}, headers=stale)
    assert refused.status_code == 412
    assert tokens(fresh, task="new") == before
    current = {"If-Match": f'"{first["generation"]}"'}
    answer = fresh.client.put("/tasks/new", json={"context": DOCUMENT}, headers=current)
    assert answer.status_code == 200, answer.text
    assert answer.json()["generation"] != first["generation"]
    assert tokens(fresh, task="new") != before
    taken = fresh.client.post("/tasks", json={"id": "new", "context": OTHER})
    assert taken.status_code == 409


def test_neighbours_answer_as_before_while_contexts_are_read(fresh: LiveServer) -> None:
    wanted = {name: tokens(fresh, task=name) for name in TASKS}
    found: list[tuple[str, Any]] = []
    ended = threading.Event()

    def read() -> None:
        with httpx.Client(base_url=fresh.url, timeout=60, trust_env=False) as client:
            for i in range(6):
                body = {"id": f"c{i}", "context": DOCUMENT}
                found.append(("context", client.post("/tasks", json=body).status_code))
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    while not ended.is_set():
        found += [(name, tokens(fresh, task=name)) for name in TASKS]
    reader.join()
    assert {code for kind, code in found if kind == "context"} == {201}
    assert len(found) > 6
    assert all(answer == wanted[name] for name, answer in found if name in wanted)


@pytest.mark.parametrize(
    ("context", "field", "expected"),
    [
        (" \n\n", "context", "at least 1 line of text"),
        ("a\n" * 300, "context", "at most 256 lines"),
        ([{"input": "a", "output": "b"}] * 257, "context", "at most 256 examples"),
        ("x" * (CONTEXT + 1), "context", f"at most {CONTEXT} tokens"),
        ("x" * (CONTEXT * 64 + 1), "context", f"at most {CONTEXT * 64} characters"),
        (
            [{"input": "a", "output": "b"}, {"input": " ", "output": "b"}],
            "context[1].input",
            "text",
        ),
        ([{"input": "a", "output": ""}], "context[0].output", "text"),
        ([{"input": "a"}], "context[0].output", ""),
        ([], "context", ""),
        (7, "context", ""),
    ],
)
def test_wrong_contexts_are_named(
    fresh: LiveServer, context: Any, field: str, expected: str
) -> None:
    steps = fresh.service.engine.stats().steps
    for method, path in (("POST", "/tasks"), ("PUT", "/tasks/amber")):
        body = {"id": "new" if method == "POST" else "amber", "context": context}
        answer = fresh.client.request(method, path, json=body)
        assert answer.status_code == 422, answer.text
        (error, *_) = answer.json()["errors"]
        assert error["field"] == field
        assert expected in error["expected"]
    assert fresh.service.engine.stats().steps == steps, "the engine has read what is refused"
    assert fresh.client.get("/tasks/new").status_code == 404


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"routing": {"logits": [[0.0]]}}, "context"),
        ({"copy_of": "amber"}, "context"),
        ({"examples": [{"input": "a", "output": "b"}]}, "context"),
        ({"id": None}, "id"),
        ({"fit": {}}, "fit"),
        ({"defaults": {"n": 1000}}, "defaults.n"),
    ],
)
def test_a_context_stands_alone(fresh: LiveServer, more: dict[str, Any], field: str) -> None:
    steps = fresh.service.engine.stats().steps
    answer = fresh.client.post("/tasks", json={"id": "new", "context": DOCUMENT, **more})
    assert answer.status_code == 422, answer.text
    assert field in {error["field"] for error in answer.json()["errors"]}
    assert fresh.service.engine.stats().steps == steps


def test_without_a_generator_a_context_is_refused(live: LiveServer) -> None:
    answer = live.client.post("/tasks", json={"id": "new", "context": DOCUMENT})
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == "context"
    assert "--method generator" in error["expected"]
    assert live.client.get("/tasks/new").status_code == 404


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path, restless_t5(eos_token_id=256))
    settings = settings_for(tmp_path, tmp_path / "data", max_context=CONTEXT, max_running=6)
    with serving(settings) as t5:
        answer = t5.client.post("/tasks", json={"id": "new", "context": DOCUMENT})
        assert answer.status_code == 422
        (error,) = answer.json()["errors"]
        assert error["field"] == "context"
        assert "encoder-decoder" in error["found"]


def test_the_client_and_the_command_send_contexts(fresh: LiveServer, tmp_path: Path) -> None:
    examples = [{"input": "cat", "output": "cats"}, {"input": "dog", "output": "dogs"}]
    with Client(fresh.url) as client:
        by_text = client.tasks.create("text", context="\n".join(LINES[:2]))
        assert by_text.provenance["texts"] == 2
        replaced = client.tasks.replace("text", context=OTHER, if_match=by_text.generation)
        assert replaced.generation != by_text.generation
        with pytest.raises(UnprocessableError, match="context"):
            client.tasks.create("wrong", context=" ")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**one, "task": "t"}) + "\n" for one in examples))
    text = tmp_path / "text.md"
    text.write_text(DOCUMENT)
    for file, texts in ((rows, 2), (text, 3)):
        name = f"from-{file.suffix[1:]}"
        told = ["tasks", "create", name, "--context", str(file), "--url", fresh.url, "--json"]
        result = CliRunner().invoke(app, told)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["provenance"]["texts"] == texts
    rows.write_text('{"input": "a"}\n')
    told = ["tasks", "create", "wrong", "--context", str(rows), "--url", fresh.url]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 1
    assert "rows.jsonl" in result.output
