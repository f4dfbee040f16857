"""The clients against a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from live_server import CONTEXT, TASKS, LiveServer
from safetensors.torch import save_file

from polyhead.clients import (
    ConflictError,
    JobFailedError,
    NotFoundError,
    Routing,
    StaleError,
    TooLargeError,
    UnprocessableError,
)

EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
QUICK = {"method": "z", "steps": 4, "holdout": 0.25}


@pytest.fixture
def client(connect: Any, live: LiveServer) -> Iterator[Any]:
    """A client of the shared server; the tasks that a test adds are removed."""
    made = connect(live.url)
    yield made
    for task in made.tasks.list():
        if task.id not in TASKS:
            made.tasks.delete(task.id)


def test_generate_and_score_are_what_the_server_answers(client: Any, live: LiveServer) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    plain = live.generate(task="amber", **asked)
    answer = client.generate("amber", n=2, logprobs=1, return_token_ids=True, **asked)
    assert answer.text == plain["choices"][0]["text"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert len(answer.choices[1].token_ids) == len(answer.choices[1].logprobs) == 8
    assert answer.usage.completion_tokens == 16
    assert client.generate("birch", **asked).text != answer.text
    mixed = client.generate(mixture={"amber": 1, "birch": 1}, **asked)
    assert (mixed.task, mixed.generation == answer.generation) == ("(mixture)", False)
    ranked = client.score("amber", prompt="hello", choices=["a", "bc"])
    body = {"task": "amber", "prompt": "hello", "choices": ["a", "bc"]}
    assert ranked.model_dump() == live.client.post("/score", json=body).json()
    assert ranked.choice == ["a", "bc"][ranked.best]


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "ignore_eos": True, "n": 2}
    pieces = list(client.stream("coral", **asked))
    whole = client.generate("coral", **asked)
    for choice in whole.choices:
        assert "".join(p.text for p in pieces if p.index == choice.index) == choice.text
    assert len(pieces) > 12
    assert pieces[-1].usage == whole.usage


def test_leaving_a_stream_frees_its_place(client: Any, live: LiveServer) -> None:
    long = {"prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True}
    with client.stream("amber", **long) as pieces:
        next(pieces)
        assert live.running() == 1
        steps = live.service.engine.stats().steps
    live.eventually(lambda: live.running() == 0, 2)
    # Had it been left to run, it would have taken a step for every token.
    assert live.service.engine.stats().steps - steps < CONTEXT / 2


def test_refusals_carry_what_the_server_said(client: Any) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.generate("nobody", prompt="x")
    assert (unknown.value.status, unknown.value.code) == (404, "unknown_task")
    assert unknown.value.errors[0].field == "task"
    assert len(unknown.value.request_id) == 32
    with pytest.raises(UnprocessableError, match="temperature") as wrong:
        next(client.stream("amber", prompt="x", temperature=-1))
    assert wrong.value.errors[0].found == "-1"
    with pytest.raises(UnprocessableError, match="unknown field"):
        client.generate("amber", prompt="x", temprature=1)
    with pytest.raises(TooLargeError):
        client.generate("amber", prompt="x" * 200_000)


def test_a_task_lives_through_the_client(client: Any) -> None:
    amber, birch = (client.tasks.routing(name) for name in ("amber", "birch"))
    routing = Routing.mix([(amber, 1), (birch, 3)])
    made = client.tasks.create("mine", routing=routing, metadata={"team": "a"})
    assert (made.kind, made.granularity, made.routing_kind) == ("routing", "module", "weights")
    assert client.tasks.routing("mine").tolist() == routing.tolist()
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 16, "ignore_eos": True}
    mixture = client.generate(mixture={"amber": 1, "birch": 3}, **asked)
    assert client.generate("mine", **asked).text == mixture.text
    assert client.generate(routing=routing, **asked).text == mixture.text
    assert client.generate("amber", **asked).text != mixture.text
    with pytest.raises(ConflictError, match="task_exists"):
        client.tasks.create("mine", routing=routing)
    edited = client.tasks.update("mine", template="Q {input} A", defaults={"max_tokens": 3})
    assert (edited.template, edited.metadata) == ("Q {input} A", {"team": "a"})
    assert client.tasks.update("mine", template="").template is None
    copied = client.tasks.copy("mine", "other")
    assert copied.metadata == {"team": "a"}
    current = client.tasks.get("other").generation
    replaced = client.tasks.replace("other", routing=amber, if_match=current)
    assert replaced.metadata == {}
    with pytest.raises(StaleError):
        client.tasks.delete("other", if_match=current)
    client.tasks.delete("other")
    with pytest.raises(NotFoundError):
        client.tasks.get("other")
    assert client.tasks.similar("mine", limit=2)[0].id in TASKS


def test_a_task_goes_back_to_what_it_was_and_comes_back(client: Any) -> None:
    name = f"back-{uuid4().hex}"
    first = client.tasks.copy("amber", name)
    second = client.tasks.replace(name, routing=client.tasks.routing("birch"))
    assert [one.ended for one in client.tasks.history(name)] == [None, "replaced"]
    with pytest.raises(StaleError):
        client.tasks.rollback(name, first.generation, if_match=first.generation)
    back = client.tasks.rollback(name, first.generation, if_match=second.generation)
    assert back.generation == first.generation
    client.tasks.delete(name)
    assert client.tasks.restore(name).generation == first.generation
    client.tasks.delete(name)


def test_a_peft_folder_is_sent_as_it_lies_there(client: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight": 0.3
        * torch.randn(shape, generator=generator)
        for name, shape in (("lora_A", (2, 64)), ("lora_B", (64, 2)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 40}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("not sent")
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    made = client.tasks.create("own", private_adapter=tmp_path, metadata={"a": 1})
    assert (made.kind, made.metadata) == ("private", {"a": 1})
    first = client.generate("own", **asked).text
    assert first != client.generate("base", **asked).text
    config["lora_alpha"] = 0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    replaced = client.tasks.replace("own", private_adapter=str(tmp_path), if_match=made.generation)
    assert replaced.generation != made.generation
    assert client.generate("own", **asked).text == client.generate("base", **asked).text
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        client.tasks.create("other", private_adapter=tmp_path)


def test_lists_turn_their_pages(client: Any) -> None:
    for number in range(5):
        client.tasks.copy("amber", f"page-{number}", metadata={"odd": number % 2})
    found = [task.id for task in client.tasks.list(prefix="page-", page_size=2)]
    assert found == [f"page-{number}" for number in range(5)]
    odd = client.tasks.list(metadata={"odd": 1}, page_size=1)
    assert [task.id for task in odd] == ["page-1", "page-3"]


def test_inventory_and_health(client: Any, live: LiveServer) -> None:
    assert client.inventory().fingerprint == live.service.inventory.fingerprint
    assert client.health().ready


def test_a_task_is_fitted_followed_and_refitted(client: Any) -> None:
    job = client.tasks.fit_new("fitted", EXAMPLES, metadata={"team": "b"}, **QUICK)
    assert job.is_open
    events = list(client.jobs.events(job))
    assert [e.method for e in events if not hasattr(e, "state")] == ["z"] * 4
    assert events[-1] == client.jobs.get(job) == client.jobs.wait(job.id)
    task = client.tasks.wait(job)
    assert (task.generation, task.metadata) == (events[-1].result.generation, {"team": "b"})
    refit = client.tasks.fit("fitted", EXAMPLES, **{**QUICK, "seed": 7})
    assert client.tasks.wait(refit, timeout=60).generation != task.generation
    assert refit.id in [found.id for found in client.jobs.list(task="fitted", page_size=1)]


def test_a_job_that_does_not_succeed_is_an_error(client: Any) -> None:
    job = client.tasks.fit_new("never", EXAMPLES, method="z", steps=10_000)
    with pytest.raises(TimeoutError, match="is still"):
        client.tasks.wait(job, timeout=0.1)
    assert client.jobs.cancel(job).state == "cancelled"
    with pytest.raises(JobFailedError) as caught:
        client.tasks.wait(job)
    assert caught.value.job.state == "cancelled"
