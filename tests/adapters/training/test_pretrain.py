"""Whole runs on a tiny backbone: what they learn, write and survive."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, save_backbone, tiny_model
from ports import free_port
from training_world import examples, save_world

from polyhead.adapters.errors import BackboneMismatch
from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import RoutedTask, use_plan
from polyhead.adapters.training.config import TrainingConfig, parse_config
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import CheckpointError, ConfigError
from polyhead.adapters.training.pretrain import StepReport, Trained, pretrain
from polyhead.adapters.training.records import read_metrics

TASKS = 4
RUN = """
import json, sys
from pathlib import Path
from polyhead.adapters.training.config import parse_config
from polyhead.adapters.training.pretrain import pretrain
config = parse_config(json.loads(sys.argv[1]), "test")
pretrain(config, Path(config.backbone), lambda _: None)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and a file of examples."""
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, TASKS)
    return folder


def table(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "backbone": str(world / "backbone"),
        "output": str(output),
        "data": {"train": [str(world / "*.jsonl")]},
        "skills": {"heads": 4, "skills": 3, "rank": 2, "scaling": 2.0},
        "optimiser": {"steps": 12, "rate": 0.01},
        "batch": {"examples": 8, "tasks": 4, "threads": 1},
        "records": {"checkpoint_every": 5, "tensorboard": False},
    }
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) else value
    return plain


def config(world: Path, output: Path, **changes: Any) -> TrainingConfig:
    return parse_config(table(world, output, **changes), "test")


def run(config: TrainingConfig, reports: list[StepReport] | None = None) -> Trained:
    seen = [] if reports is None else reports
    return pretrain(config, Path(config.backbone), seen.append)


def curve(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize("method", ["lora", "poly", "mhr"])
def test_a_run_learns_and_writes_an_inventory(world: Path, tmp_path: Path, method: str) -> None:
    one_head = {"heads": 1} if method != "mhr" else {}
    one_skill = {"skills": 1} if method == "lora" else {}
    given = config(
        world,
        tmp_path,
        method=method,
        skills={**one_head, **one_skill},
        optimiser={"steps": 40},
    )
    reports: list[StepReport] = []
    trained = run(given, reports)
    assert [report.step for report in reports] == list(range(1, 41))
    losses = [loss for _, loss in curve(tmp_path)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    inventory = Inventory.load(tmp_path / "inventory")
    assert inventory.fingerprint == trained.inventory.fingerprint
    assert sorted(inventory.tasks) == ["t0", "t1", "t2", "t3"]
    assert inventory.header.provenance["steps"] == 40
    assert inventory.header.provenance["losses"].keys() == inventory.tasks.keys()
    assert inventory.header.provenance["data"][0]["examples"] == 48


def test_the_inventory_serves_what_was_trained(world: Path, tmp_path: Path) -> None:
    """The losses of the end, computed by the serving path; those of wrong tasks differ."""
    changes = {"optimiser": {"steps": 60, "schedule": "constant"}}
    run(config(world, tmp_path, **changes))
    inventory = Inventory.load(tmp_path / "inventory")
    model = tiny_model()
    injection = inject(model, inventory)
    given = [Example(e.task, e.input, e.output) for e in examples(TASKS, each=12)]
    encoded = Encoder(byte_tokenizer()).encode(given)
    right, wrong = [], []
    for example, one in zip(given, encoded, strict=True):
        other = f"t{(int(example.task[1:]) + 1) % TASKS}"
        for task, losses in ((example.task, right), (other, wrong)):
            weights = inventory.tasks[task].weights(inventory.layout)
            ids = torch.tensor([one.prompt + one.answer])
            plan = injection.plan([RoutedTask(task, weights)], [ids.shape[1]])
            with torch.no_grad(), use_plan(plan):
                logits = model(ids).logits[0].log_softmax(-1)
            places = torch.arange(len(one.prompt) - 1, ids.shape[1] - 1)
            losses.append(-logits[places, torch.tensor(one.answer)].mean().item())
    last = sum(inventory.header.provenance["losses"].values()) / TASKS
    assert sum(right) / len(right) == pytest.approx(last, rel=0.5)
    assert sum(wrong) > 1.3 * sum(right)


def test_two_runs_are_alike_and_another_seed_is_not(world: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config(world, tmp_path / name, seed=seed))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


def test_accumulation_changes_nothing_but_rounding(world: Path, tmp_path: Path) -> None:
    for name, parts in (("a", 1), ("b", 3)):
        run(config(world, tmp_path / name, batch={"accumulate": parts}))
    first, second = ([loss for _, loss in curve(tmp_path / name)] for name in "ab")
    assert first == pytest.approx(second, rel=1e-3)


def test_a_killed_run_ends_with_the_same_curve(world: Path, tmp_path: Path) -> None:
    """Killed for good in the middle, twice, and started again: as if nothing had happened."""
    changes: dict[str, Any] = {"optimiser": {"steps": 40}, "skills": {"relaxed": True}}
    run(config(world, tmp_path / "whole", **changes))
    output = tmp_path / "killed"
    for lines in (8, 23):
        kill_after(table(world, output, **changes), output, lines)
    assert 23 <= len(curve(output)) < 40
    trained = run(config(world, output, **changes))
    assert curve(output) == curve(tmp_path / "whole")
    whole = Inventory.load(tmp_path / "whole" / "inventory")
    assert trained.inventory.fingerprint == whole.fingerprint
    assert len(list((output / "checkpoints").iterdir())) == 2


def kill_after(plain: dict[str, Any], output: Path, lines: int) -> None:
    """Start the run in a process of its own and kill it once it has written so many lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(plain)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(curve(output)) < lines:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_checkpoint_of_another_run_is_refused(world: Path, tmp_path: Path) -> None:
    run(config(world, tmp_path))
    with pytest.raises(CheckpointError, match="made with another configuration"):
        run(config(world, tmp_path, seed=3))


def test_a_finished_run_is_not_trained_again(world: Path, tmp_path: Path) -> None:
    first = run(config(world, tmp_path))
    reports: list[StepReport] = []
    assert run(config(world, tmp_path), reports).inventory.fingerprint == (
        first.inventory.fingerprint
    )
    assert reports == []


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_coarse_routings_keep_their_granularity(
    world: Path, tmp_path: Path, granularity: str
) -> None:
    changes = {"skills": {"granularity": granularity, "dtype": "bfloat16"}}
    run(config(world, tmp_path, **changes))
    inventory = Inventory.load(tmp_path / "inventory")
    assert inventory.header.dtype == "bfloat16"
    assert {routing.granularity for routing in inventory.tasks.values()} == {granularity}


def test_zero_shot_mu_tunes_the_average(world: Path, tmp_path: Path) -> None:
    first = run(config(world, tmp_path / "mhr"))
    given = config(
        world, tmp_path / "mu", method="mu-zero-shot", start=str(tmp_path / "mhr/inventory")
    )
    tuned = run(given)
    layout = tuned.inventory.layout
    for routing in tuned.inventory.tasks.values():
        assert torch.all(routing.weights(layout) == 1 / 3)
    name = layout.modules[0]
    assert not torch.equal(tuned.inventory.a[name], first.inventory.a[name])
    start = curve(tmp_path / "mu")[0][1]
    assert start < curve(tmp_path / "mhr")[0][1], "it begins where the inventory's average is"


def test_training_goes_on_from_an_inventory(world: Path, tmp_path: Path) -> None:
    first = run(config(world, tmp_path / "first"))
    given = config(world, tmp_path / "more", start=str(tmp_path / "first/inventory"))
    again = run(given)
    assert curve(tmp_path / "more")[0][1] < curve(tmp_path / "first")[0][1]
    assert again.inventory.header.provenance["start"] == first.inventory.fingerprint

    nothing = {"rate": 1e-30, "logits_rate": 1e-30}
    still = run(config(world, tmp_path / "still", start=given.start, optimiser=nothing))
    for task, routing in first.inventory.tasks.items():
        assert torch.equal(still.inventory.tasks[task].values, routing.values)
    assert not any(
        torch.equal(again.inventory.tasks[task].values, routing.values)
        for task, routing in first.inventory.tasks.items()
    )


def test_going_on_from_other_skills_is_refused(world: Path, tmp_path: Path) -> None:
    run(config(world, tmp_path / "first"))
    start = str(tmp_path / "first/inventory")
    with pytest.raises(ConfigError, match=r"skills\.rank: .*start from has"):
        run(config(world, tmp_path / "more", start=start, skills={"rank": 7}))
    with pytest.raises(ConfigError, match=r"skills\.granularity: .*by module"):
        run(config(world, tmp_path / "more", start=start, skills={"granularity": "block"}))


def test_zero_shot_mu_wants_the_inventorys_backbone(world: Path, tmp_path: Path) -> None:
    run(config(world, tmp_path / "mhr"))
    save_backbone(tiny_model(seed=9), tmp_path / "other")
    given = config(
        world,
        tmp_path / "mu",
        method="mu-zero-shot",
        start=str(tmp_path / "mhr/inventory"),
        backbone=str(tmp_path / "other"),
    )
    with pytest.raises(BackboneMismatch):
        run(given)


def test_alignment_and_tensorboard_are_written_where_asked(world: Path, tmp_path: Path) -> None:
    records = {"alignment_every": 4, "tensorboard": True, "every": 2}
    run(config(world, tmp_path, records=records, batch={"accumulate": 2}))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    measured = {line["step"]: line["alignment"] for line in lines if "alignment" in line}
    assert sorted(measured) == [4, 8, 12]
    assert all(-1 <= value <= 1 for value in measured.values())
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("batch", [{"bfloat16": True}, {"checkpointing": True}])
def test_other_ways_of_computing_learn_as_well(
    world: Path, tmp_path: Path, batch: dict[str, bool]
) -> None:
    run(config(world, tmp_path / "a"))
    run(config(world, tmp_path / "b", batch=batch))
    first, second = ([loss for _, loss in curve(tmp_path / name)] for name in "ab")
    assert second == pytest.approx(first, rel=0.05)


def test_settings_that_cannot_be_met_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: nothing matches; found '.*absent"):
        run(config(world, tmp_path, data={"train": [str(world / "absent*")]}))
    with pytest.raises(ConfigError, match=r"data\.templates\.t9: no such task"):
        run(config(world, tmp_path, data={"templates": {"t9": "{input}"}}))
    with pytest.raises(ConfigError, match=r"batch\.examples: .*at least 9"):
        run(config(world, tmp_path, batch={"accumulate": 9}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        run(config(world, tmp_path, backbone=str(world)))


def test_two_processes_learn_what_one_does(world: Path, tmp_path: Path) -> None:
    """Under accelerate, with torch's launcher: examples are shared out, gradients averaged."""
    run(config(world, tmp_path / "one"))
    script = tmp_path / "run.py"
    script.write_text(RUN + "from accelerate import PartialState\nprint(PartialState())\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(free_port()), str(script)]
    launched = subprocess.run(
        [*launch, json.dumps(table(world, tmp_path / "two"))],
        timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr
    assert "Num processes: 2" in launched.stdout
    first, second = (curve(tmp_path / name) for name in ("one", "two"))
    assert [step for step, _ in second] == list(range(1, 13)), "one process writes, not both"
    assert [loss for _, loss in second] == pytest.approx([loss for _, loss in first], rel=1e-3)
    one, two = (Inventory.load(tmp_path / name / "inventory") for name in ("one", "two"))
    assert one.header.provenance["losses"] == pytest.approx(
        two.header.provenance["losses"], rel=1e-2
    )
