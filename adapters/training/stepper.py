"""One step of pre-training: its parts' gradients, over all processes, and the optimiser's step."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.adapters.training import alignment
from polyhead.adapters.training.answers import AnswersBatch, Encoded
from polyhead.adapters.training.causality import check_causal
from polyhead.adapters.training.config import TrainingConfig
from polyhead.adapters.training.errors import ConfigError
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.methods import Plan
from polyhead.adapters.training.mixture import shares
from polyhead.adapters.training.schedule import rate_share
from polyhead.adapters.training.trainable import Trainable


@dataclass(frozen=True)
class StepFigures:
    """What a step showed, over all processes."""

    sums: list[float]  # by task: its examples' losses added up
    counts: list[float]  # by task: how many examples it had
    rate: float
    gradient_norm: float
    alignment: float | None


class Stepper:
    """Takes steps: what a step does depends on the state, the seed and the step's number only."""

    def __init__(
        self, config: TrainingConfig, plan: Plan, model: PreTrainedModel, accelerator: Accelerator
    ) -> None:
        """Raises `ConfigError` when a step has fewer examples than parts to compute it in."""
        self._config = config
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
        self.trainable = Trainable(
            model,
            plan.modules,
            plan.source,
            plan.header.scaling,
            checkpointing=config.batch.checkpointing,
        )
        self.optimiser = plan.optimiser()
        self._highest = [group["lr"] for group in self.optimiser.param_groups]
        self._forward: Any = accelerator.prepare_model(self.trainable)
        self._checked = accelerator.device.type == "cpu"  # whose kernels the tests have seen

    def learn(self, step: int, drawn: Sequence[tuple[int, Encoded]]) -> StepFigures:
        """Take step `step` (from 0) on pairs of task and example; the same on every process."""
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        # Sampled weights, too, are a function of the step, so a resumed run draws the same.
        torch.manual_seed(random.Random(f"{self._config.seed}/{step}/{rank}").getrandbits(63))
        self._plan.begin(step, drawn)
        own = shares(drawn, self._parts)[rank::world]
        watched = self._watch(step)
        sums = torch.zeros(2, len(self._plan.tasks), device=self._accelerator.device)
        for number, part in enumerate(own):
            last = number == len(own) - 1
            sums += self._backward(part, len(drawn) / world, synchronise=last)
        norm = self._update(step)
        totals: Any = self._accelerator.reduce(sums, reduction="sum")
        aligned = alignment.mean_cosine(alignment.gram(watched[0])) if watched else None
        rate = self.optimiser.param_groups[0]["lr"]
        losses, counts = totals.tolist()
        return StepFigures(losses, counts, rate, norm, aligned)

    def _backward(
        self, part: Sequence[tuple[int, Encoded]], examples: float, synchronise: bool
    ) -> Tensor:
        """Adds the gradients of one part; answers `[2, tasks]`: sums of losses, and counts."""
        batch = self.trainable.pack([one for _, one in part], [task for task, _ in part])
        owners = torch.tensor(batch.example_task, device=self._accelerator.device)
        if not self._checked:
            with self._autocast():
                check_causal(self.trainable, batch)
            self._checked = True
        alone = nullcontext() if synchronise else self._accelerator.no_sync(self._forward)
        with alone:
            losses = self._losses(batch)
            self._accelerator.backward(losses.sum() / examples)
        sums = torch.zeros(2, len(self._plan.tasks), device=losses.device)
        both = torch.stack([losses.detach().float(), torch.ones_like(losses)])
        return sums.index_add_(1, owners, both)

    def _losses(self, batch: AnswersBatch) -> Tensor:
        with self._autocast():
            losses: Tensor = self._forward(batch)
        return losses

    def _autocast(self) -> torch.autocast:
        # Not accelerate's mixed precision, which cannot differ between two runs of one process.
        device = self._accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._config.batch.bfloat16)

    def _update(self, step: int) -> float:
        options = self._config.optimiser
        share = rate_share(step, options)
        for group, highest in zip(self.optimiser.param_groups, self._highest, strict=True):
            group["lr"] = highest * share
        limit = float("inf") if options.clip is None else options.clip
        norm = torch.nn.utils.clip_grad_norm_(self._plan.source.parameters(), limit)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(norm)

    def _watch(self, step: int) -> list[Factors]:
        """Whether and where this step's first part is measured: the factors, once they are made."""
        every = self._config.records.alignment_every
        found: list[Factors] = []
        if every is None or (step + 1) % every:
            return found

        def keep(factors: Factors) -> None:
            self.trainable.on_factors = None
            alignment.watch(factors)
            found.append(factors)

        self.trainable.on_factors = keep
        return found
