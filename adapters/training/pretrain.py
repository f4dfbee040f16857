"""Pre-training: skills and routings learned together on many tasks.

Everything a step depends on is the state after the last one, the seed and the step's number. So a
run that is killed and started again goes on from its last checkpoint and ends as if it had not
been. Several processes are accelerate's business: `accelerate launch` starts them.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.checkpoint import (
    Checkpoint,
    last_checkpoint,
    restore_state,
    save_checkpoint,
    training_state,
)
from polyhead.adapters.training.config import TrainingConfig
from polyhead.adapters.training.corpus import Corpus, read_corpus
from polyhead.adapters.training.errors import CheckpointError, ConfigError
from polyhead.adapters.training.generated import GeneratorPlan
from polyhead.adapters.training.methods import Plan
from polyhead.adapters.training.mixture import Mixture
from polyhead.adapters.training.reading import closes_prompts
from polyhead.adapters.training.records import Records
from polyhead.adapters.training.stepper import StepFigures, Stepper

CHECKPOINTS = "checkpoints"
INVENTORY = "inventory"
SMOOTHING = 0.9
"""A task's reported loss is its running mean: this much of it stays at each of its steps."""


@dataclass(frozen=True)
class StepReport:
    """One finished step, for whoever draws a progress bar."""

    step: int  # steps done
    steps: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Trained:
    """What came of a run."""

    inventory: Inventory
    folder: Path
    losses: dict[str, float]  # running mean of each task's loss
    trained_numbers: int


def pretrain(
    config: TrainingConfig, backbone: Path, report: Callable[[StepReport], None]
) -> Trained:
    """Train, or go on from the last checkpoint in `config.output`, and write the inventory.

    backbone: a transformers folder. Raises `TrainingError`, `InjectionError`, `InventoryError`.
    """
    if config.batch.threads is not None:
        torch.set_num_threads(config.batch.threads)
    accelerator = Accelerator(mixed_precision="no")  # a setting of the process: see `_losses`
    model = _load(backbone, config.batch.bfloat16, accelerator.device)
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
    corpus = read_corpus(config.data, tokenizer, closed=closes_prompts(model))
    if config.method == "generator":
        plan: Plan = GeneratorPlan(config, model, backbone.name, corpus, tokenizer)
    else:
        plan = Plan(config, model, backbone.name, corpus.tasks)
    run = Run(config, corpus, plan, model, accelerator)
    run.resume()
    with _records(config, run.step, accelerator.is_main_process) as records:
        run.train(records, report)
    return run.finish()


class Run:
    """The steps of one run. `step` counts those that are done."""

    def __init__(
        self,
        config: TrainingConfig,
        corpus: Corpus,
        plan: Plan,
        model: PreTrainedModel,
        accelerator: Accelerator,
    ) -> None:
        """Raises `ConfigError` when a step has fewer examples than parts to compute it in."""
        self.step = 0
        self.losses: dict[str, float] = {}
        self._config = config
        self._corpus = corpus
        self._plan = plan
        self._accelerator = accelerator
        self._stepper = Stepper(config, plan, model, accelerator)

    def resume(self) -> None:
        """Take over the last checkpoint, if there is one. Raises `CheckpointError`."""
        checkpoint = last_checkpoint(self._config.output / CHECKPOINTS)
        if checkpoint is None:
            return
        if checkpoint.facts["run"] != self._identity:
            raise CheckpointError(
                "made with another configuration or other data; choose another output",
                field=str(self._config.output),
            )
        restore_state(self._plan.source, self._stepper.optimiser, checkpoint.tensors)
        self.step = checkpoint.step
        self.losses = dict(checkpoint.facts["losses"])

    def train(self, records: Records | None, report: Callable[[StepReport], None]) -> None:
        """The steps that are left."""
        config = self._config
        for drawn in self._mixture().steps(self.step):
            if self.step >= config.optimiser.steps:
                break
            began = time.perf_counter()
            figures = self._figures(self._stepper.learn(self.step, drawn), drawn)
            self.step += 1
            seconds = time.perf_counter() - began
            if records is None:
                continue
            last = self.step == config.optimiser.steps
            if last or self.step % config.records.every == 0:
                records.write(self.step, {**figures, "seconds": seconds})
            if last or self.step % config.records.checkpoint_every == 0:
                self._save()
            steps = config.optimiser.steps
            report(StepReport(self.step, steps, figures["loss"], figures["tokens"], seconds))

    def finish(self) -> Trained:
        """Give the backbone back and write the inventory, whole or not at all."""
        self._stepper.trainable.detach()
        inventory = self._plan.inventory(self._provenance())
        folder = self._config.output / INVENTORY
        if self._accelerator.is_main_process:
            unfinished = folder.with_name(f"{INVENTORY}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            inventory.save(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        self._accelerator.wait_for_everyone()
        return Trained(inventory, folder, self.losses, self._plan.trained_numbers)

    def _mixture(self) -> Mixture:
        batch = self._config.batch
        return Mixture(
            self._corpus.encoded,
            tasks_per_step=batch.tasks,
            examples_per_task=batch.examples // batch.tasks,
            sampling=self._config.data.sampling,
            seed=self._config.seed,
        )

    def _figures(self, found: StepFigures, drawn: Sequence[tuple[int, Encoded]]) -> dict[str, Any]:
        by_task = zip(self._corpus.tasks, found.sums, found.counts, strict=True)
        seen = {task: total / count for task, total, count in by_task if count}
        for task, loss in seen.items():
            before = self.losses.get(task, loss)
            self.losses[task] = SMOOTHING * before + (1 - SMOOTHING) * loss
        figures: dict[str, Any] = {
            "loss": sum(found.sums) / sum(found.counts),
            "rate": found.rate,
            "gradient_norm": found.gradient_norm,
            "tokens": sum(len(one) for _, one in drawn),
            "tasks": seen,
        }
        return figures if found.alignment is None else {**figures, "alignment": found.alignment}

    def _save(self) -> None:
        tensors = training_state(self._plan.source, self._stepper.optimiser)
        facts = {"run": self._identity, "losses": self.losses}
        folder = self._config.output / CHECKPOINTS
        save_checkpoint(folder, Checkpoint(self.step, tensors, facts), self._config.records.keep)

    @property
    def _identity(self) -> str:
        """SHA-256 of whatever the curve depends on."""
        plain = self._config.model_dump(mode="json", exclude={"output", "records", "backbone"})
        plain["batch"].pop("threads")
        if self._config.method != "generator":
            plain.pop("generator")
        plain["backbone"] = self._plan.backbone.fingerprint
        plain["start"] = self._plan.start
        plain["data"]["train"] = [source["sha256"] for source in self._corpus.sources]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def _provenance(self) -> dict[str, Any]:
        return {
            "method": self._config.method,
            "steps": self.step,
            "seed": self._config.seed,
            "trained_numbers": self._plan.trained_numbers,
            "start": self._plan.start,
            "losses": {task: round(loss, 4) for task, loss in sorted(self.losses.items())},
            "data": list(self._corpus.sources),
            "config": self._config.model_dump(mode="json", exclude={"output", "records"}),
        }


def _load(backbone: Path, bfloat16: bool, device: torch.device) -> PreTrainedModel:
    """Under bf16 autocast the frozen weights are kept in bf16, not cast at every use."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    try:
        config = AutoConfig.from_pretrained(backbone, local_files_only=True)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded = kind.from_pretrained(
            backbone, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as exc:
        raise ConfigError(f"cannot be loaded: {exc}", field=f"backbone {backbone}") from exc
    model: PreTrainedModel = loaded.to(device).requires_grad_(False)
    return model


def _records(
    config: TrainingConfig, step: int, writes: bool
) -> AbstractContextManager[Records | None]:
    """Only the main process writes."""
    if not writes:
        return nullcontext()
    return Records(config.output, step, config.records.tensorboard)
