"""Many tasks learn together by one method: one batch a step, every row with its own parameters.

Nothing that a task learns depends on the other tasks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from polyhead.adapters.training.answers import AnswersBatch, Encoded, micro_batches
from polyhead.adapters.training.fewshot_adam import OwnersAdam
from polyhead.adapters.training.fewshot_methods import Parameters
from polyhead.adapters.training.fewshot_runs import Learner, TaskRun
from polyhead.adapters.training.fewshot_types import FitProgress
from polyhead.adapters.training.trainable import Trainable

LAST_RATE = 0.1
"""What part of the learning rate is left at the last step; it falls in a straight line."""


@dataclass(frozen=True)
class Hooks:
    """How a fit talks to whoever runs it."""

    report: Callable[[FitProgress], None]
    pause: Callable[[], None]
    cancelled: Callable[[str], bool]
    scored: Callable[[], None]  # after held-out scores: a good moment to save the state


class JointFit:
    """Runs the steps. `state` and `resume` carry it over the end of a process."""

    def __init__(
        self,
        trainable: Trainable,
        learners: Sequence[Learner],
        runs: Sequence[TaskRun],
        parameters: Parameters,
        hooks: Hooks,
        micro_tokens: int,
    ) -> None:
        """trainable: over the parameters' source. parameters: one slice for each learner.
        micro_tokens: the most tokens of one forward and
        backward pass, between which the hooks are asked to pause."""
        self.step = 0
        self.runs = list(runs)
        self._trainable = trainable
        self._learners = list(learners)
        self._parameters = parameters
        self._hooks = hooks
        self._micro_tokens = micro_tokens
        self._adam = OwnersAdam(parameters.owned)

    def run(self) -> None:
        """Until every task is finished or cancelled."""
        if self.step:
            self._settle(self._live())  # an interrupted fit may have ended before it was scored
        while live := self._live():
            began = time.monotonic()
            self._learn(live)
            self.step += 1
            _charge(live, began)
            self._settle(live)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain facts, taken between two steps."""
        tensors: dict[str, Tensor] = {}
        for one, mean, square in zip(
            self._adam.owned, self._adam.mean, self._adam.square, strict=True
        ):
            tensors |= {f"now/{one.name}": one.parameter.detach(), f"mean/{one.name}": mean}
            tensors[f"square/{one.name}"] = square
        for number, run in enumerate(self.runs):
            tensors |= {f"best/{number}/{name}": t for name, t in (run.best or {}).items()}
        return tensors, {"step": self.step, "runs": [run.facts() for run in self.runs]}

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a `state` of a fit that was built alike."""
        self.step = facts["step"]
        for i, one in enumerate(self._adam.owned):
            one.parameter.data.copy_(tensors[f"now/{one.name}"])
            self._adam.mean[i].copy_(tensors[f"mean/{one.name}"])
            self._adam.square[i].copy_(tensors[f"square/{one.name}"])
        for number, (run, found) in enumerate(zip(self.runs, facts["runs"], strict=True)):
            head = f"best/{number}/"
            best = {key.removeprefix(head): t for key, t in tensors.items() if key.startswith(head)}
            run.restore(found, best or None)

    def _live(self) -> list[TaskRun]:
        for run in self.runs:
            run.cancelled = run.cancelled or (not run.finished and self._hooks.cancelled(run.name))
        return [run for run in self.runs if not (run.finished or run.cancelled)]

    def _learn(self, live: Sequence[TaskRun]) -> None:
        work = {
            learner: self._learners[learner].draw(self.step)
            for run in live
            for learner in (*run.scored, run.keeper)
        }
        losses = torch.zeros(len(self._learners))
        for part in micro_batches(work, self._micro_tokens):
            self._hooks.pause()
            batch = self._pack(part)
            shares = torch.tensor([1 / len(work[learner]) for learner, _ in part])
            weighted = self._trainable(batch) * shares.to(batch.gold.device)
            weighted.sum().backward()
            owners = torch.tensor(batch.example_task)
            losses.index_add_(0, owners, weighted.detach().float().cpu())
        self._adam.step(self.step + 1, self._rates(live))
        for run in live:
            run.loss = float(losses[run.keeper])

    def _rates(self, live: Sequence[TaskRun]) -> list[Tensor]:
        """`[T]` for each parameter; 0 for learners of tasks that have stopped."""
        rates = []
        for owned in self._parameters.owned:
            rate = torch.zeros(len(self._learners))
            for run in live:
                part = 1 - (1 - LAST_RATE) * self.step / run.options.steps
                own = part * self._parameters.rate(owned, run.options)
                rate[[*run.scored, run.keeper]] = own
            rates.append(rate.to(owned.parameter.device))
        return rates

    def _settle(self, live: Sequence[TaskRun]) -> None:
        """Score what is due at this step, and see which tasks are finished."""
        due = [run for run in live if run.is_due(self.step)]
        if due:
            began = time.monotonic()
            self._score(due)
            _charge(due, began)
        for run in live:
            if not isfinite(run.loss) or (
                run.scored and run.history.exhausted(run.options.patience)
            ):
                run.finished = True
            elif self.step >= run.options.steps:
                run.finished = True
                run.best = run.best or self._parameters.snapshot(run.keeper)
            self._hooks.report(self._progress(run))
        if due:
            self._hooks.scored()

    def _score(self, due: Sequence[TaskRun]) -> None:
        work = {
            learner: list(self._learners[learner].held_out) for run in due for learner in run.scored
        }
        right: dict[int, list[bool]] = {learner: [] for learner in work}
        losses: dict[int, list[float]] = {learner: [] for learner in work}
        for part in micro_batches(work, self._micro_tokens):
            self._hooks.pause()
            exact, loss = self._trainable.score(self._pack(part))
            for (learner, _), hit, value in zip(part, exact.tolist(), loss.tolist(), strict=True):
                right[learner].append(hit)
                losses[learner].append(value)
        for run in due:
            all_right = [hit for learner in run.scored for hit in right[learner]]
            all_losses = [value for learner in run.scored for value in losses[learner]]
            run.history.add(self.step, all_right, all_losses)
            if run.history.improved:
                run.best = self._parameters.snapshot(run.keeper)

    def _pack(self, part: Sequence[tuple[int, Encoded]]) -> AnswersBatch:
        return self._trainable.pack([one for _, one in part], [learner for learner, _ in part])

    def _progress(self, run: TaskRun) -> FitProgress:
        steps = self.step if run.finished else run.options.steps
        method = self._parameters.method
        return FitProgress(run.name, method, self.step, steps, run.loss, run.history.last)


def _charge(runs: Sequence[TaskRun], began: float) -> None:
    spent = time.monotonic() - began
    for run in runs:
        run.seconds += spent
