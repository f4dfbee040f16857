"""`polyhead train`: a pre-training run and its progress on a terminal."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyhead.server.commands.common import AsJson, fail, one_line_errors

if TYPE_CHECKING:
    from polyhead.adapters.training.config import TrainingConfig
    from polyhead.adapters.training.pretrain import Trained


def train_command(
    config: Annotated[Path, typer.Option(help="TOML file that describes the run")],
    method: Annotated[
        str | None,
        typer.Option(help="lora, poly, mhr, mu-zero-shot or generator instead of the file's"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learn skills and routings on many tasks, or go on where a killed run stopped.

    Several GPUs: `accelerate launch --no_python polyhead train --config FILE`.
    """
    from polyhead.adapters.training.config import read_config
    from polyhead.adapters.training.errors import ConfigError

    with one_line_errors():
        try:
            trained = _run(read_config(config, method), quiet=as_json)
        except ConfigError as exc:
            fail(str(exc), 2)
    facts = {
        "inventory": str(trained.folder),
        "fingerprint": trained.inventory.fingerprint,
        "trained_numbers": trained.trained_numbers,
        "losses": trained.losses,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(f"{trained.folder}: {len(trained.losses)} tasks")


def _run(config: "TrainingConfig", quiet: bool) -> "Trained":
    from polyhead.adapters.training.pretrain import StepReport, pretrain
    from polyhead.server.engine.backbone import find_backbone

    bar = _bar()
    shown: AbstractContextManager[Any] = nullcontext() if quiet else bar
    with shown:
        task = bar.add_task("train", total=config.optimiser.steps, loss=float("nan"), speed=0.0)

        def report(step: StepReport) -> None:
            speed = step.tokens / step.seconds
            bar.update(task, completed=step.step, loss=step.loss, speed=speed)

        return pretrain(config, find_backbone(config.backbone), report)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        speed_estimate_period=120,
    )
