"""Every method on every task of a suite, answered by whatever serves: what it is worth."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE, Encoder
from polyhead.adapters.training.fewshot import FitOptions, FitProgress, FitTask, fit
from polyhead.adapters.training.fewshot_prompted import fitting_shots, prompt_with_shots
from polyhead.adapters.training.fewshot_types import TrainedMethod
from polyhead.adapters.training.report import Measured, Metric
from polyhead.adapters.training.scores import (
    ChoiceScore,
    exact_match,
    mean,
    ranked_right,
    token_f1,
)
from polyhead.adapters.training.suite import SuiteTask

SPARE_TOKENS = 4
"""How much longer than the longest wanted answer an answer may become."""


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt for one adapter. choices: texts to rank as continuations, empty to answer."""

    adapter: Adapter
    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


class Answerer(Protocol):
    """Answers as serving does, so that what is measured is what is served."""

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """The greedy continuation of each prompt."""
        ...

    def rank(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """For each question the log-likelihood of each of its choices after the prompt."""
        ...


@dataclass(frozen=True)
class EvalOptions:
    """What is measured. shots: examples in the prompt of the bare backbone. test: at most so many
    test examples a task, None for all. A seed draws a task's examples and everything after."""

    seeds: tuple[int, ...] = (0,)
    examples: int = 32
    shots: int = 16
    methods: tuple[TrainedMethod, ...] = ("z", "mhr", "mu", "lora")
    test: int | None = None
    fit: FitOptions = field(default_factory=FitOptions)


@dataclass(frozen=True, eq=False)
class System:
    """One way to do one task: how it is prompted and by which adapter it is answered."""

    name: str
    task: SuiteTask
    seed: int
    adapter: Adapter
    prompt: Callable[[Example], str]
    stop: tuple[str, ...] = ()


def fit_suite(
    model: PreTrainedModel,
    inventory: Inventory,
    tokenizer: Any,
    tasks: Sequence[SuiteTask],
    options: EvalOptions,
    report: Callable[[FitProgress], None] = lambda _: None,
) -> dict[tuple[str, str, int], Adapter]:
    """Adapters of the held-out tasks by (task, method, seed), one joint fit a method and seed."""
    found: dict[tuple[str, str, int], Adapter] = {}
    held_out = [task for task in tasks if task.held_out]
    for seed in options.seeds:
        for method in options.methods:
            chosen = replace(options.fit, method=method, seed=seed)
            wanted = [
                FitTask(task.name, tuple(shots_of(task, options, seed)), task.template, chosen)
                for task in held_out
            ]
            for one in fit(model, inventory, tokenizer, wanted, report=report):
                adapter: Adapter = one.private
                if one.routing is not None:
                    adapter = _routed(one.routing, inventory, f"{one.task}/{method}/{seed}")
                found[one.task, method, seed] = adapter
    return found


def systems(
    inventory: Inventory,
    tokenizer: Any,
    tasks: Sequence[SuiteTask],
    fitted: Mapping[tuple[str, str, int], Adapter],
    options: EvalOptions,
) -> Iterator[System]:
    """Everything to measure: the bare backbone twice, the average, and what was learned."""
    uniform = _routed(Routing.uniform(inventory.layout), inventory, "uniform")
    for task in tasks:
        plain = Encoder(tokenizer, task.template).prompt_text
        shown = Encoder(tokenizer, DEFAULT_TEMPLATE)  # its prompt says once what is asked
        stop = ("\n\n",) if any("\n" in one.output for one in task.test) else ("\n",)
        first = options.seeds[0]
        yield System("base", task, first, None, _Instructed(tokenizer, task))
        for seed in options.seeds:
            shots = shots_of(task, options, seed)[: options.shots]
            shots = fitting_shots(tokenizer, shown, shots)
            prompt = _Prompted(shown, tuple(shots), task.description)
            yield System(f"base, {options.shots} shots", task, seed, None, prompt, stop)
        yield System("uniform", task, first, uniform, plain)
        if not task.held_out and task.name in inventory.tasks:
            trained = _routed(inventory.tasks[task.name], inventory, f"{task.name}/trained")
            yield System("trained", task, first, trained, plain)
        for (name, method, seed), adapter in fitted.items():
            if name == task.name:
                yield System(method, task, seed, adapter, plain)


def measure(
    answerer: Answerer, tokenizer: Any, system: System, options: EvalOptions
) -> list[Measured]:
    """Exact match and token F1 of one system, and rank classification where there are choices."""
    task = system.task
    asked = task.test[: options.test]
    longest = max(len(_ids(tokenizer, example.output)) for example in asked)
    questions = [
        Question(system.adapter, system.prompt(one), longest + SPARE_TOKENS, system.stop)
        for one in asked
    ]
    pairs = list(zip(answerer.answer(questions), asked, strict=True))
    scores: dict[Metric, float] = {
        "exact": mean([exact_match(answer, one.output) for answer, one in pairs]),
        "f1": mean([token_f1(answer, one.output) for answer, one in pairs]),
    }
    if asked[0].choices:
        scores["rank"] = _ranked(answerer, system, asked)
    return [
        Measured(task.name, task.held_out, system.name, metric, system.seed, value)
        for metric, value in scores.items()
    ]


def shots_of(task: SuiteTask, options: EvalOptions, seed: int) -> list[Example]:
    """The examples that a seed draws for a task, the same for every method."""
    count = min(options.examples, len(task.fewshot))
    return random.Random(seed).sample(task.fewshot, count)


def _ranked(answerer: Answerer, system: System, asked: Sequence[Example]) -> float:
    ranked = [one for one in asked if one.choices and one.output in one.choices]
    questions = [
        Question(system.adapter, system.prompt(one), 0, choices=one.choices or ()) for one in ranked
    ]
    found = answerer.rank(questions)
    return mean(
        [
            ranked_right(scores, (one.choices or ()).index(one.output))
            for scores, one in zip(found, ranked, strict=True)
        ]
    )


def _routed(routing: Routing, inventory: Inventory, key: str) -> RoutedTask:
    return RoutedTask(key, routing.weights(inventory.layout))


@dataclass(frozen=True)
class _Instructed:
    """The task's description and input, in the backbone's own chat form where it has one."""

    tokenizer: Any
    task: SuiteTask

    def __call__(self, example: Example) -> str:
        text = f"{self.task.description}\n{example.input}"
        if self.tokenizer.chat_template is None:
            return f"{text}\n"
        turns = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )


@dataclass(frozen=True)
class _Prompted:
    encoder: Encoder
    shots: tuple[Example, ...]
    instruction: str

    def __call__(self, example: Example) -> str:
        return prompt_with_shots(self.encoder, self.shots, example, self.instruction)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids
