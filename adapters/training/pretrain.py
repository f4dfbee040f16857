"""Pre-training: skills and routings learned together on many tasks.

Everything a step depends on is the state after the last one, the seed and the step's number. So a
run that is killed and started again goes on from its last checkpoint and ends as if it had not
been. Several processes are accelerate's business: `accelerate launch` starts them.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training import alignment
from polyhead.adapters.training.checkpoint import (
    Checkpoint,
    last_checkpoint,
    restore_state,
    save_checkpoint,
    training_state,
)
from polyhead.adapters.training.config import TrainingConfig
from polyhead.adapters.training.corpus import Corpus, read_corpus
from polyhead.adapters.training.encode import Encoded, TrainingBatch, pack
from polyhead.adapters.training.errors import CheckpointError, ConfigError
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.methods import Plan
from polyhead.adapters.training.mixture import Mixture, shares
from polyhead.adapters.training.records import Records
from polyhead.adapters.training.schedule import rate_share
from polyhead.adapters.training.trainable import Trainable

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
    corpus = read_corpus(config.data, tokenizer)
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
        self._parts = config.batch.accumulate * accelerator.num_processes
        if config.batch.examples < self._parts:
            raise ConfigError(
                "fewer examples than parts of a step",
                field="batch.examples",
                found=str(config.batch.examples),
                expected=f"at least {self._parts}, for accumulate times processes",
            )
        plan.source.to(accelerator.device)
        self._trainable = Trainable(
            model,
            plan.modules,
            plan.source,
            plan.header.scaling,
            checkpointing=config.batch.checkpointing,
        )
        self._optimiser = plan.optimiser()
        self._highest = [group["lr"] for group in self._optimiser.param_groups]
        self._forward: Any = accelerator.prepare_model(self._trainable)

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
        restore_state(self._plan.source, self._optimiser, checkpoint.tensors)
        self.step = checkpoint.step
        self.losses = dict(checkpoint.facts["losses"])

    def train(self, records: Records | None, report: Callable[[StepReport], None]) -> None:
        """The steps that are left."""
        config = self._config
        for drawn in self._mixture().steps(self.step):
            if self.step >= config.optimiser.steps:
                break
            began = time.perf_counter()
            figures = self._learn(drawn)
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
        self._trainable.detach()
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

    def _learn(self, drawn: Sequence[tuple[int, Encoded]]) -> dict[str, Any]:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        # Sampled weights, too, are a function of the step, so a resumed run draws the same.
        torch.manual_seed(random.Random(f"{self._config.seed}/{self.step}/{rank}").getrandbits(63))
        own = shares(drawn, self._parts)[rank::world]
        watched = self._watch()
        sums = torch.zeros(2, len(self._corpus.tasks), device=self._accelerator.device)
        for number, part in enumerate(own):
            last = number == len(own) - 1
            sums += self._backward(part, len(drawn) / world, synchronise=last)
        norm = self._update()
        totals: Any = self._accelerator.reduce(sums, reduction="sum")
        figures = self._figures(totals.tolist(), drawn)
        figures["gradient_norm"] = norm
        if watched:
            figures["alignment"] = alignment.mean_cosine(alignment.gram(watched[0]))
        return figures

    def _backward(
        self, part: Sequence[tuple[int, Encoded]], examples: float, synchronise: bool
    ) -> Tensor:
        """Adds the gradients of one part; answers `[2, tasks]`: sums of losses, and counts."""
        batch = pack([one for _, one in part], [task for task, _ in part])
        batch = batch.to(self._accelerator.device)
        owners = torch.tensor(batch.example_task, device=self._accelerator.device)
        alone = nullcontext() if synchronise else self._accelerator.no_sync(self._forward)
        with alone:
            losses = self._losses(batch)
            self._accelerator.backward(losses.sum() / examples)
        sums = torch.zeros(2, len(self._corpus.tasks), device=losses.device)
        both = torch.stack([losses.detach().float(), torch.ones_like(losses)])
        return sums.index_add_(1, owners, both)

    def _losses(self, batch: TrainingBatch) -> Tensor:
        # Not accelerate's mixed precision, which cannot differ between two runs of one process.
        device = self._accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._config.batch.bfloat16):
            losses: Tensor = self._forward(batch)
        return losses

    def _update(self) -> float:
        options = self._config.optimiser
        share = rate_share(self.step, options)
        for group, highest in zip(self._optimiser.param_groups, self._highest, strict=True):
            group["lr"] = highest * share
        limit = float("inf") if options.clip is None else options.clip
        norm = torch.nn.utils.clip_grad_norm_(self._plan.source.parameters(), limit)
        self._optimiser.step()
        self._optimiser.zero_grad()
        return float(norm)

    def _figures(
        self, totals: list[list[float]], drawn: Sequence[tuple[int, Encoded]]
    ) -> dict[str, Any]:
        sums, counts = totals
        seen = {
            task: total / count
            for task, total, count in zip(self._corpus.tasks, sums, counts, strict=True)
            if count
        }
        for task, loss in seen.items():
            before = self.losses.get(task, loss)
            self.losses[task] = SMOOTHING * before + (1 - SMOOTHING) * loss
        return {
            "loss": sum(sums) / sum(counts),
            "rate": self._optimiser.param_groups[0]["lr"],
            "tokens": sum(len(one) for _, one in drawn),
            "tasks": seen,
        }

    def _watch(self) -> list[Factors]:
        """Whether and where this step's first part is measured: the factors, once they are made."""
        every = self._config.records.alignment_every
        found: list[Factors] = []
        if every is None or (self.step + 1) % every:
            return found

        def keep(factors: Factors) -> None:
            self._trainable.on_factors = None
            alignment.watch(factors)
            found.append(factors)

        self._trainable.on_factors = keep
        return found

    def _save(self) -> None:
        tensors = training_state(self._plan.source, self._optimiser)
        facts = {"run": self._identity, "losses": self.losses}
        folder = self._config.output / CHECKPOINTS
        save_checkpoint(folder, Checkpoint(self.step, tensors, facts), self._config.records.keep)

    @property
    def _identity(self) -> str:
        """SHA-256 of whatever the curve depends on."""
        plain = self._config.model_dump(mode="json", exclude={"output", "records", "backbone"})
        plain["batch"].pop("threads")
        plain["backbone"] = self._plan.backbone.fingerprint
        plain["data"]["train"] = [source["sha256"] for source in self._corpus.sources]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def _provenance(self) -> dict[str, Any]:
        return {
            "method": self._config.method,
            "steps": self.step,
            "seed": self._config.seed,
            "trained_numbers": self._plan.trained_numbers,
            "losses": {task: round(loss, 4) for task, loss in sorted(self.losses.items())},
            "data": list(self._corpus.sources),
            "config": self._config.model_dump(mode="json", exclude={"output", "records"}),
        }


def _load(backbone: Path, bfloat16: bool, device: torch.device) -> PreTrainedModel:
    """Under bf16 autocast the frozen weights are kept in bf16, not cast at every use."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
