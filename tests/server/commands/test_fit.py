"""`polyhead fit`: from a file of examples to what a server can serve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import save_backbone
from fit_world import WORDS, world
from transformers import PreTrainedModel
from typer.testing import CliRunner

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training import fewshot
from polyhead.server.cli import app
from polyhead.server.engine.backbone import pick_dtype, pick_fit_dtype
from polyhead.server.tasks.registry import Registry

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A saved backbone and inventory, as the command's options."""
    root = tmp_path_factory.mktemp("world")
    model, inventory = world()
    save_backbone(model, root / "backbone")
    inventory.save(root / "inventory")
    return ["--backbone", str(root / "backbone"), "--inventory", str(root / "inventory")]


def examples(path: Path, *tasks: str) -> list[str]:
    lines = [{"task": t, "input": w, "output": w[0] + t[0]} for t in tasks for w in WORDS[:6]]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return ["--examples", str(path)]


def test_one_task_becomes_a_routing_in_a_file(folders: list[str], tmp_path: Path) -> None:
    given = examples(tmp_path / "few.jsonl", "rhyme")
    out = tmp_path / "rhyme.safetensors"
    wanted = ["--task", "rhyme", "--method", "z", "--steps", "4", "--out", str(out), "--json"]
    done = runner.invoke(app, ["fit", *folders, *given, *wanted])
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["task"], found["method"], found["kind"]) == ("rhyme", "z", "routing")
    assert [one["method"] for one in found["methods"]] == ["z"]
    inventory = Inventory.load(folders[3])
    Routing.from_safetensors(out.read_bytes(), inventory.layout)


def test_the_backbone_computes_in_what_is_asked_for(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    sound = fewshot.fit

    def watching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> list[fewshot.FitResult]:
        found.append(model.dtype)
        return sound(model, *args, **kwargs)

    monkeypatch.setattr(fewshot, "fit", watching)
    given = examples(tmp_path / "few.jsonl", "rhyme")
    how = ["--method", "z", "--steps", "2", "--out", str(tmp_path / "out.safetensors")]
    for dtype in ("float32", "bfloat16", "auto"):
        done = runner.invoke(app, ["fit", *folders, *given, *how, "--dtype", dtype])
        assert done.exit_code == 0, done.stderr
    cpu = torch.device("cpu")
    assert found == [torch.float32, torch.bfloat16, pick_dtype("auto", cpu)]
    assert pick_fit_dtype("float16", cpu) == torch.float32
    assert pick_fit_dtype("auto", torch.device("cuda")) == torch.float32


def test_a_warm_start_tells_whose_routing_it_began_from(tmp_path: Path) -> None:
    """The task itself is known here, fitted before; without the flag nothing is said."""
    model, inventory = world()
    save_backbone(model, tmp_path / "backbone")
    inventory.save(tmp_path / "inventory")
    folders = ["--backbone", str(tmp_path / "backbone")]
    given = examples(tmp_path / "few.jsonl", "rhyme")
    out = tmp_path / "rhyme.safetensors"
    how = ["--method", "z", "--steps", "30", "--out", str(out), "--json"]
    began = []
    for flags in ([], ["--warm-start"]):
        where = ["--inventory", str(tmp_path / "inventory")]
        done = runner.invoke(app, ["fit", *folders, *where, *given, *how, *flags])
        assert done.exit_code == 0, done.stderr
        began.append(json.loads(done.stdout)[0]["began_from"])
        inventory.tasks["known"] = Routing.from_safetensors(out.read_bytes(), inventory.layout)
        inventory.save(tmp_path / "inventory")
    assert began == [[], ["known"]]


def test_every_task_of_a_file_is_fitted_and_registered(folders: list[str], tmp_path: Path) -> None:
    given = examples(tmp_path / "few.jsonl", "alpha", "beta")
    out, data = tmp_path / "out", tmp_path / "data"
    where = ["--out", str(out), "--data-dir", str(data)]
    how = ["--method", "mu", "--steps", "3", "--template", "Q: {input}\\nA:"]
    for _ in range(2):  # the second time there are tasks of these names already
        done = runner.invoke(app, ["fit", *folders, *given, *where, *how])
        assert done.exit_code == 0, done.stderr
    assert "alpha" in done.stdout
    inventory = Inventory.load(folders[3])
    registry = Registry(data, inventory.fingerprint, inventory.layout)
    for name in ("alpha", "beta"):
        written = PrivateAdapter.from_safetensors(
            (out / f"{name}.safetensors").read_bytes(), inventory.header.modules
        )
        task, content = registry.load(name)
        assert isinstance(content, PrivateAdapter)
        assert content.fingerprint == written.fingerprint
        assert task.template == "Q: {input}\nA:"
        assert task.provenance == {"how": "fitted", "method": "mu"}
    registry.close()


def test_a_line_need_not_name_the_task_that_the_command_names(
    folders: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"input": "cat", "output": "c"}\n\n{"input": "dog", "output": "d"}\n')
    wanted = [
        "--examples",
        str(path),
        "--steps",
        "1",
        "--method",
        "z",
        "--out",
        str(tmp_path / "o"),
    ]
    done = runner.invoke(app, ["fit", *folders, *wanted, "--task", "first"])
    assert done.exit_code == 0, done.stderr
    done = runner.invoke(app, ["fit", *folders, *wanted])
    assert done.exit_code == 1
    assert f"{path}:1.task" in done.stderr


def test_a_file_that_is_no_text_is_named(folders: list[str], tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_bytes(b'{"input": "\xff", "output": "a"}')
    where = ["--examples", str(path), "--out", str(tmp_path / "o")]
    for named in ([], ["--task", "first"]):
        done = runner.invoke(app, ["fit", *folders, *where, *named])
        assert done.exit_code == 1
        assert f"error: {path}: cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "--out or --data-dir is needed"),
        (["--out", "x", "--method", "magic"], 2, "--method"),
        (["--out", "x", "--steps", "0"], 2, "--steps: out of range; expected at least 1; found 0"),
        (["--out", "x", "--logits-rate", "0"], 2, "--logits-rate: out of range"),
        (["--out", "x", "--method", "lora", "--warm-start"], 2, "--warm-start: out of range"),
        (["--out", "x", "--task", "other"], 1, "no examples of the task 'other'"),
        (["--out", "x", "--template", "no place"], 1, "template"),
        (["--out", "x", "--template", 'say "{input}"'], 2, "--template: not text with JSON's"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folders: list[str], tmp_path: Path, options: list[str], status: int, message: str
) -> None:
    given = examples(tmp_path / "few.jsonl", "rhyme")
    done = runner.invoke(app, ["fit", *folders, *given, *options])
    assert done.exit_code == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
