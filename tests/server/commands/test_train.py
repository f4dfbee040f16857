"""`polyhead train` from its file to its inventory."""

import json
from pathlib import Path

import pytest
from factories import save_backbone, tiny_model
from training_world import examples
from typer.testing import CliRunner

from polyhead.adapters.inventory import Inventory
from polyhead.server.cli import app

CONFIG = """
backbone = "{folder}/backbone"
output = "{folder}/run"
[data]
train = ["{folder}/train.jsonl"]
[skills]
heads = 4
skills = 2
rank = 2
[optimiser]
steps = 3
[batch]
examples = 4
tasks = 2
threads = 1
[records]
tensorboard = false
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    save_backbone(tiny_model(), folder / "backbone")
    lines = [
        {"task": one.task, "input": one.input, "output": one.output} for one in examples(2, each=4)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.toml").write_text(CONFIG.format(folder=folder))
    return folder


def test_it_trains_and_says_what_came_of_it(world: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--config", str(world / "train.toml"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    inventory = Inventory.load(facts["inventory"])
    assert facts["fingerprint"] == inventory.fingerprint
    assert facts["losses"].keys() == inventory.tasks.keys() == {"t0", "t1"}


def test_progress_shows_loss_and_speed_and_the_last_line_the_result(world: Path) -> None:
    config = world / "other.toml"
    config.write_text(CONFIG.format(folder=world).replace("/run", "/other"))
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 0, result.output
    assert "3/3" in result.stderr
    assert "tokens/s" in result.stderr
    assert result.stdout.strip() == f"{world}/other/inventory: 2 tasks"


def test_a_wrong_key_ends_it_with_status_2(world: Path) -> None:
    config = world / "wrong.toml"
    config.write_text(CONFIG.format(folder=world).replace("rank", "ranks"))
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 2
    assert f"error: {config}: skills.ranks: unknown key" in result.stderr


def test_wrong_data_end_it_with_status_1(world: Path) -> None:
    (world / "bad.jsonl").write_text('{"task": "t0", "input": "x"}\n')
    config = world / "bad.toml"
    config.write_text(CONFIG.format(folder=world).replace("train.jsonl", "bad.jsonl"))
    result = CliRunner().invoke(app, ["train", "--config", str(config)])
    assert result.exit_code == 1
    assert "bad.jsonl:1.output: wrong value" in result.stderr
