"""`polyhead eval`: what is measured is what the engine serves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    alone,
    byte_tokenizer,
    merged,
    random_task,
    save_backbone,
    tiny_inventory,
    tiny_t5,
)
from fit_world import WORDS, world
from transformers import PreTrainedModel
from typer.testing import CliRunner

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.evaluate import Question
from polyhead.adapters.training.suite import read_suite
from polyhead.server.cli import app
from polyhead.server.commands.answering import EngineAnswerer
from polyhead.server.engine.request import Request, SamplingParams

runner = CliRunner()


def write_suite(folder: Path) -> Path:
    """A training task with choices and a held-out one."""
    facts = {"template": "{input}\n", "description": "Say something."}
    tasks = [
        {"name": "known", "held_out": False, **facts},
        {"name": "new", "held_out": True, **facts},
    ]
    for task in tasks:
        own = folder / str(task["name"])
        own.mkdir(parents=True)
        lines = [{"task": task["name"], "input": w, "output": w[0]} for w in WORDS]
        if task["name"] == "known":
            lines = [{**line, "choices": sorted({w[0] for w in WORDS})} for line in lines]  # type: ignore[dict-item]
        for name, part in (("fewshot", lines[:6]), ("test", lines[6:])):
            (own / f"{name}.jsonl").write_text("\n".join(json.dumps(one) for one in part))
    (folder / "suite.json").write_text(json.dumps({"format": 1, "tasks": tasks}))
    return folder


def write_place(root: Path, model: PreTrainedModel, inventory: Inventory) -> Path:
    inventory.tasks["known"] = Routing.checked(
        random_task(inventory, "known", 3).weights, inventory.layout, "weights"
    )
    save_backbone(model, root / "backbone")
    inventory.save(root / "inventory")
    write_suite(root / "suite")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("world"), *world())


@pytest.fixture(scope="module")
def t5_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_t5(eos_token_id=256, pad_token_id=0)
    return write_place(tmp_path_factory.mktemp("t5"), model, tiny_inventory(model))


@pytest.mark.parametrize("kind", ["place", "t5_place"])
def test_every_system_is_measured_and_written(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place: Path = request.getfixturevalue(kind)
    options = {
        "--backbone": place / "backbone",
        "--inventory": place / "inventory",
        "--out": tmp_path,
        "--methods": "z,mu",
        "--seeds": 2,
        "--examples": 4,
        "--shots": 2,
        "--steps": 2,
        "--test": 3,
    }
    flags = [str(part) for pair in options.items() for part in pair]
    done = runner.invoke(app, ["eval", str(place / "suite"), *flags, "--json"])
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    seen = {(one["task"], one["system"], one["metric"], one["seed"]) for one in found}
    assert len(seen) == len(found)
    exact = {key[:2] + key[3:] for key in seen if key[2] == "exact"}
    both = {(t, s, n) for t in ("known", "new") for s, n in (("base", 0), ("uniform", 0))}
    both |= {(t, "base, 2 shots", n) for t in ("known", "new") for n in (0, 1)}
    fitted = {("new", method, n) for method in ("z", "mu") for n in (0, 1)}
    assert exact == both | fitted | {("known", "trained", 0)}
    assert {key[0] for key in seen if key[2] == "rank"} == {"known"}
    assert all(0 <= one["value"] <= 1 for one in found)
    text = (tmp_path / "scores.md").read_text()
    assert "## Held-out tasks: exact match" in text
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_answers_and_ranks_are_the_merged_models_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYHEAD_DTYPE", "float32")  # as the merged model, whatever the CPU
    model, inventory = world()
    tokenizer = byte_tokenizer()
    tasks = [random_task(inventory, f"t{n}", n) for n in range(3)]
    questions = [
        Question(task, f"{word}\n", 6, choices=()) for task in (*tasks, None) for word in WORDS[:3]
    ]
    answerer = EngineAnswerer.load(str(place / "backbone"), place / "inventory", "cpu")
    try:
        found = answerer.answer(questions)
        ranked = answerer.rank(
            [Question(q.adapter, q.prompt, 0, choices=("ab", "q")) for q in questions]
        )
    finally:
        answerer.close()
    for question, text, scores in zip(questions, found, ranked, strict=True):
        own = merged(model, inventory, question.adapter)
        prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
        request = Request("r", "t", "g", tuple(prompt), params=SamplingParams(max_tokens=6))
        wanted = alone(own, request)
        wanted = wanted[: wanted.index(256)] if 256 in wanted else wanted
        # A character that the last token leaves unfinished is not shown.
        assert text.rstrip("\ufffd") == tokenizer.decode(wanted).rstrip("\ufffd")
        for choice, score in zip(("ab", "q"), scores, strict=True):
            ids = tokenizer.encode(choice, add_special_tokens=False)
            logits = own(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            each = logits.log_softmax(-1)[range(len(ids)), ids]
            assert score.tokens == len(ids)
            assert score.logprob == pytest.approx(float(each.sum()), abs=1e-3)
    # Control: the tasks answer differently, so a mix-up would show.
    assert len(set(found)) > 6


def test_a_folder_that_is_no_suite_is_refused(place: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--backbone", "none", "--inventory", str(place / "inventory")]
    done = runner.invoke(app, ["eval", str(tmp_path), *out])
    assert done.exit_code == 1
    assert "suite.json" in done.stderr
    done = runner.invoke(app, ["eval", str(place / "suite"), *out, "--tasks", "known,odd"])
    assert done.exit_code == 1
    assert "['odd']" in done.stderr
    done = runner.invoke(app, ["eval", str(place / "suite"), *out, "--methods", "z,magic"])
    assert done.exit_code == 2
    assert "magic" in done.stderr


def test_a_suite_keeps_its_order_and_its_parts(place: Path) -> None:
    both = read_suite(place / "suite")
    assert [task.name for task in both] == ["known", "new"]
    assert [task.held_out for task in both] == [False, True]
    assert (len(both[0].fewshot), len(both[0].test)) == (6, len(WORDS) - 6)
    assert [task.name for task in read_suite(place / "suite", ["new"])] == ["new"]
    assert Inventory.load(place / "inventory").tasks.keys() == {"known"}
