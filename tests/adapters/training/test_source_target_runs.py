"""Whole runs on a tiny T5: what training learns is what is served, and tasks are fitted to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import save_backbone, tiny_inventory, tiny_t5
from fit_world import WORDS, always_q, task
from torch import Tensor
from training_world import closing_tokenizer, encoded, examples
from transformers import PreTrainedModel
from typer.testing import CliRunner

from polyhead.adapters.encoder_decoder import IGNORED, EncoderDecoder
from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.config import parse_config
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.fewshot import FitResult, fit
from polyhead.adapters.training.fewshot_types import TrainedMethod
from polyhead.adapters.training.pretrain import StepReport, Trained, pretrain
from polyhead.adapters.training.records import read_metrics
from polyhead.server.cli import app

TASKS = 3
METHODS: tuple[TrainedMethod, ...] = ("z", "mhr", "mu", "lora")


def backbone() -> PreTrainedModel:
    return tiny_t5("gated-gelu", 2.0, eos_token_id=256, pad_token_id=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 and a file of examples."""
    folder = tmp_path_factory.mktemp("world")
    save_backbone(backbone(), folder / "backbone")
    closing_tokenizer().save_pretrained(folder / "backbone")
    lines = [
        {"task": one.task, "input": one.input, "output": one.output}
        for one in examples(TASKS, each=12)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(
    world: Path,
    output: Path,
    report: Callable[[StepReport], None] = lambda _: None,
    **changes: Any,
) -> Trained:
    plain: dict[str, Any] = {
        "backbone": str(world / "backbone"),
        "output": str(output),
        "data": {"train": [str(world / "train.jsonl")]},
        "skills": {"heads": 4, "skills": 3, "rank": 2, "scaling": 2.0},
        "optimiser": {"steps": 40, "rate": 0.02, "schedule": "constant"},
        "batch": {"examples": 9, "tasks": 3, "threads": 1},
        "records": {"checkpoint_every": 20, "tensorboard": False},
    }
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) else value
    config = parse_config(plain, "test")
    return pretrain(config, Path(config.backbone), report)


def curve(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")]


def served_losses(
    model: PreTrainedModel, inventory: Inventory, tokens: list[Encoded], adapters: list[Adapter]
) -> Tensor:
    """By the layers that serve, in one padded batch. The model keeps its adapters."""
    served = EncoderDecoder(model, inject(model, inventory))
    ids = padded([one.prompt for one in tokens], 0)
    mask = (padded([one.prompt for one in tokens], IGNORED) != IGNORED).long()
    labels = padded([one.answer for one in tokens], IGNORED)
    return served.losses(served.encode(ids, mask, adapters), labels)


def padded(rows: list[tuple[int, ...]], filling: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filling] * (longest - len(row))] for row in rows])


@pytest.mark.parametrize("method", ["lora", "poly", "mhr"])
def test_a_run_learns_and_writes_an_inventory(world: Path, tmp_path: Path, method: str) -> None:
    one_head = {"heads": 1} if method != "mhr" else {}
    one_skill = {"skills": 1} if method == "lora" else {}
    run(world, tmp_path, method=method, skills={**one_head, **one_skill})
    losses = curve(tmp_path)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert sorted(Inventory.load(tmp_path / "inventory").tasks) == ["t0", "t1", "t2"]


def test_the_inventory_serves_what_was_trained(world: Path, tmp_path: Path) -> None:
    """The losses of the end, computed by the layers that serve; those of wrong tasks are worse."""
    trained = run(world, tmp_path, optimiser={"steps": 80})
    inventory = Inventory.load(tmp_path / "inventory")
    tokens, tasks = encoded(examples(TASKS, each=12), closed=True)
    layout = inventory.layout
    known = {n: RoutedTask(n, r.weights(layout)) for n, r in inventory.tasks.items()}
    right, wrong = (
        served_losses(backbone(), inventory, tokens, [known[f"t{(t + by) % 3}"] for t in tasks])
        for by in (0, 1)
    )
    last = sum(trained.losses.values()) / TASKS
    assert float(right.mean()) == pytest.approx(last, rel=0.5)
    assert wrong.sum() > 1.2 * right.sum()


class CutOff(Exception):
    pass


def test_a_run_goes_on_from_its_checkpoint(world: Path, tmp_path: Path) -> None:
    """As if it had not been cut off; another seed is the control."""

    def cut_off(step: StepReport) -> None:
        if step.step == 13:
            raise CutOff

    few = {"optimiser": {"steps": 16}, "records": {"checkpoint_every": 10}}
    with pytest.raises(CutOff):
        run(world, tmp_path / "cut", report=cut_off, **few)
    assert len(curve(tmp_path / "cut")) < 16
    run(world, tmp_path / "cut", **few)
    run(world, tmp_path / "whole", **few)
    run(world, tmp_path / "other", seed=1, **few)
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut") != curve(tmp_path / "other")


def test_bfloat16_learns_as_well(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path, batch={"bfloat16": True})
    losses = curve(tmp_path)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_a_task_that_is_then_served(method: TrainedMethod) -> None:
    model = backbone()
    inventory = tiny_inventory(model)
    wanted = task("always", always_q, 11, method=method, steps=30, holdout=0.3, patience=30)
    idle = task("always", always_q, 11, method=method, steps=1, rate=1e-9, logits_rate=1e-9)
    (before,) = fit(model, inventory, closing_tokenizer(), [idle])
    (after,) = fit(model, inventory, closing_tokenizer(), [wanted])
    assert (after.routing is None) == (method != "z")
    tokens = Encoder(closing_tokenizer(), closed=True).encode(wanted.examples)
    losses = [
        served_losses(backbone(), inventory, tokens, [adapter(one, inventory)] * len(tokens))
        for one in (before, after)
    ]
    assert losses[1].mean() < 0.7 * losses[0].mean()


def adapter(result: FitResult, inventory: Inventory) -> Adapter:
    if result.routing is None:
        return result.private
    return RoutedTask("fitted", result.routing.weights(inventory.layout))


def test_auto_asks_the_prompted_backbone_too() -> None:
    model = backbone()
    (found,) = fit(model, tiny_inventory(model), closing_tokenizer(), [task("always", always_q)])
    assert "prompted" in {one.method for one in found.methods}
    assert found.prompted_score is not None


def test_a_fit_by_command(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path, optimiser={"steps": 2})
    lines = [json.dumps({"input": word, "output": word[0]}) for word in WORDS[:6]]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    folders = ["--backbone", str(world / "backbone"), "--inventory", str(tmp_path / "inventory")]
    given = ["--examples", str(tmp_path / "few.jsonl"), "--task", "first"]
    out = tmp_path / "first.safetensors"
    how = ["--method", "z", "--steps", "2", "--out", str(out)]
    done = CliRunner().invoke(app, ["fit", *folders, *given, *how])
    assert done.exit_code == 0, done.stderr
    Routing.from_safetensors(out.read_bytes(), Inventory.load(tmp_path / "inventory").layout)
