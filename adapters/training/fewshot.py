"""Few-shot fitting: many tasks at once, each by the method that suits it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.encode import Encoder
from polyhead.adapters.training.errors import DataError
from polyhead.adapters.training.fewshot_check import check_examples, example_key, refuse_problems
from polyhead.adapters.training.fewshot_joint import Hooks, JointFit
from polyhead.adapters.training.fewshot_methods import start, trained_numbers
from polyhead.adapters.training.fewshot_prompted import fitting_shots, prompted_right
from polyhead.adapters.training.fewshot_runs import Prepared, learners_of
from polyhead.adapters.training.fewshot_state import (
    FitState,
    Outcome,
    fit_fingerprint,
    load_state,
    save_state,
)
from polyhead.adapters.training.fewshot_types import (
    FitOptions,
    FitProgress,
    FitResult,
    FitTask,
    MethodScore,
    TrainedMethod,
)
from polyhead.adapters.training.holdout import choose_splits
from polyhead.adapters.training.reading import closes_prompts
from polyhead.adapters.training.skills import SharedSkills
from polyhead.adapters.training.trainable import Trainable
from polyhead.adapters.training.warm_start import begin_near

__all__ = [
    "FitInterrupted",
    "FitOptions",
    "FitProgress",
    "FitResult",
    "FitTask",
    "MethodScore",
    "fit",
]

ORDER: tuple[TrainedMethod, ...] = ("z", "mu", "mhr", "lora")
WARM: tuple[TrainedMethod, ...] = ("z", "mhr")
"""Methods with logits, which can begin from another task's."""
MAX_TOGETHER = 100_000_000
"""Numbers trained in one batch; Adam and the best state take each four times in memory."""


class FitInterrupted(Exception):
    """Raised by `pause` to end a fit here; with a state file, the same call goes on later."""


def fit(
    model: PreTrainedModel,
    inventory: Inventory,
    tokenizer: Any,
    tasks: Sequence[FitTask],
    *,
    report: Callable[[FitProgress], None] = lambda _: None,
    pause: Callable[[], None] = lambda: None,
    cancelled: Callable[[str], bool] = lambda _: False,
    state_file: Path | None = None,
    micro_tokens: int = 512,
    max_tokens: int = 512,
) -> list[FitResult]:
    """Fit tasks together; a task's result does not depend on the others.

    model: a bare backbone in float32 or bfloat16, bare again afterwards; what is learned is
    float32. tokenizer: its transformers tokenizer.
    report: called after every step, once for each task. pause: called before every forward pass,
    each of at most about `micro_tokens` tokens; may block, or raise `FitInterrupted`. cancelled:
    asked by task name before every step. state_file: read if it is there, kept up to date, left
    behind. max_tokens: of one example, answer and template included.
    A cancelled task has no result, nor has one whose numbers overflowed.
    Results come in the order of the tasks. Raises `DataError` naming task and example,
    `CheckpointError`, and `BackboneMismatch` where the inventory is another backbone's.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError("tasks with the same name", field="tasks", found=str(names))
    inventory.check_backbone(BackboneRef.of(model, "the backbone"))
    fitting = _Fitting(model, inventory, tokenizer, tasks, max_tokens, state_file)
    hooks = Hooks(report, pause, cancelled, fitting.save)
    with fitting.saved_when_interrupted():
        fitting.prompt(hooks)
        for method in ORDER:
            fitting.train(method, hooks, micro_tokens)
    return fitting.results()


class _Fitting:
    """One call of `fit`: which method is due for which task, and what came of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        inventory: Inventory,
        tokenizer: Any,
        tasks: Sequence[FitTask],
        max_tokens: int,
        state_file: Path | None,
    ) -> None:
        self._model, self._inventory, self._tokenizer = model, inventory, tokenizer
        self._tasks = list(tasks)
        closed = closes_prompts(model)
        self._encoders = [
            Encoder(tokenizer, task.template, max_tokens, closed=closed) for task in tasks
        ]
        self._prepared = [_prepare(t, e) for t, e in zip(tasks, self._encoders, strict=True)]
        self._cancelled: set[int] = set()
        self._file = state_file
        self._fingerprint = fit_fingerprint(inventory, tasks)
        self._state = FitState()
        if state_file is not None:
            self._state = load_state(state_file, self._fingerprint, inventory)
        self._joint: tuple[TrainedMethod, list[int], JointFit] | None = None

    def prompt(self, hooks: Hooks) -> None:
        """Score the bare backbone with the examples in its prompt, where that is wanted."""
        for number, task in enumerate(self._tasks):
            wanted = task.options.prompted or task.options.method == "auto"
            if not wanted or number in self._state.prompted or self._gone(number, hooks):
                continue
            began = time.monotonic()
            right = self._prompted_right(number, hooks)
            if right:
                score = sum(right) / len(right)
                self._state.prompted[number] = (score, time.monotonic() - began)

    def train(self, method: TrainedMethod, hooks: Hooks, micro_tokens: int) -> None:
        """Fit by this method the tasks it is due for, as many together as memory takes."""
        due = [
            number
            for number in range(len(self._tasks))
            if not self._gone(number, hooks) and self._is_due(number, method)
        ]
        if not due:
            return
        skills = SharedSkills.of(self._inventory).to(self._model.device).requires_grad_(False)
        for group in self._groups(method, due):
            self._train_group(method, group, skills, hooks, micro_tokens)

    def results(self) -> list[FitResult]:
        """The best outcome of each task that has one."""
        fitted = {number for number, _ in self._state.outcomes} - self._cancelled
        return [self._result(number) for number in sorted(fitted)]

    def save(self) -> None:
        """Write the state file, if there is to be one."""
        if self._file is None:
            return
        if self._joint is not None:
            method, group, joint = self._joint
            tensors, facts = joint.state()
            self._state.running = (tensors, facts | {"round": [method, group]})
        save_state(self._file, self._fingerprint, self._state)

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except FitInterrupted:
            self.save()
            raise

    def _prompted_right(self, number: int, hooks: Hooks) -> list[bool]:
        task, encoder = self._tasks[number], self._encoders[number]
        right: list[bool] = []
        for split in self._prepared[number].splits:
            learned = [task.examples[i] for i in split.train]
            shots = fitting_shots(self._tokenizer, encoder, learned)
            asked = [task.examples[i] for i in split.held_out]
            right += prompted_right(
                self._model, self._tokenizer, encoder, shots, asked, hooks.pause
            )
        return right

    def _gone(self, number: int, hooks: Hooks) -> bool:
        if hooks.cancelled(self._tasks[number].name):
            self._cancelled.add(number)
        return number in self._cancelled

    def _is_due(self, number: int, method: TrainedMethod) -> bool:
        if (number, method) in self._state.outcomes.keys() | self._state.overflowed:
            return False
        wanted = self._tasks[number].options.method
        if wanted != "auto":
            return wanted == method
        return method == "z" or (method == "mu" and self._falls_short(number))

    def _falls_short(self, number: int) -> bool:
        """Whether a routing is no better than the prompted backbone, and not perfect either."""
        routed = self._state.outcomes.get((number, "z"))
        if routed is None:
            return True
        if routed.score is None or number not in self._state.prompted:
            return False
        return routed.score < 1 and routed.score <= self._state.prompted[number][0]

    def _groups(self, method: TrainedMethod, due: Sequence[int]) -> Iterator[list[int]]:
        """Tasks in their order, cut so that no group trains more than `MAX_TOGETHER` numbers."""
        if self._state.running is not None and self._state.running[1]["round"][0] == method:
            first = list(self._state.running[1]["round"][1])
            yield first
            due = [number for number in due if number not in first]
        each = trained_numbers(method, self._inventory)
        group: list[int] = []
        used = 0
        for number in due:
            size = each * (len(self._prepared[number].splits) + 1)
            if group and used + size > MAX_TOGETHER:
                yield group
                group, used = [], 0
            group.append(number)
            used += size
        if group:
            yield group

    def _train_group(
        self,
        method: TrainedMethod,
        group: list[int],
        skills: SharedSkills,
        hooks: Hooks,
        micro_tokens: int,
    ) -> None:
        learners, runs = learners_of([self._prepared[number] for number in group])
        parameters = start(method, self._inventory, skills, [o.options.seed for o in learners])
        header = self._inventory.header
        trainable = Trainable(self._model, header.modules, parameters.source, header.scaling)
        try:
            joint = JointFit(trainable, learners, runs, parameters, hooks, micro_tokens)
            running = self._state.running
            # Another round's, where all of its tasks were cancelled since: it will not go on.
            if running is not None and running[1]["round"] == [method, group]:
                joint.resume(*running)
            elif method in WARM:
                begin_near(
                    trainable, self._inventory, skills, learners, runs, parameters, hooks.pause
                )
            self._joint = (method, group, joint)
            joint.run()
            for number, run in zip(group, runs, strict=True):
                if run.cancelled:
                    self._cancelled.add(number)
                elif run.best is None:
                    self._state.overflowed.add((number, method))
                else:
                    adapter = parameters.export(run.keeper, run.best)
                    outcome = Outcome(adapter, run.history.score, run.seconds, run.began_from)
                    self._state.outcomes[number, method] = outcome
        finally:
            trainable.detach()
        self._joint = self._state.running = None
        self.save()

    def _result(self, number: int) -> FitResult:
        tried = {m: self._state.outcomes[number, m] for m in ORDER if self._has(number, m)}
        # The first of equals: a routing is cheaper to keep and to serve than an adapter.
        best = max(tried, key=lambda method: tried[method].score or 0.0)
        adapter = tried[best].adapter
        methods = [MethodScore(m, o.score, o.seconds) for m, o in tried.items()]
        prompted = self._state.prompted.get(number)
        if prompted is not None:
            methods.append(MethodScore("prompted", *prompted))
        return FitResult(
            task=self._tasks[number].name,
            method=best,
            routing=adapter if isinstance(adapter, Routing) else None,
            private=adapter if isinstance(adapter, PrivateAdapter) else None,
            score=tried[best].score,
            prompted_score=None if prompted is None else prompted[0],
            methods=tuple(methods),
            seconds=sum(one.seconds for one in methods),
            began_from=tried[best].began_from,
        )

    def _has(self, number: int, method: TrainedMethod) -> bool:
        return (number, method) in self._state.outcomes


def _prepare(task: FitTask, encoder: Encoder) -> Prepared:
    refuse_problems(task.name, check_examples(task.examples, encoder))
    keys: list[Any] = [example_key(example) for example in task.examples]
    options = task.options
    splits = choose_splits(keys, options.holdout, options.folds, options.seed)
    return Prepared(task.name, tuple(encoder.encode(task.examples)), splits, options)
