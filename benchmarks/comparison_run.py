"""One run of `comparison`: trains by one method from one seed, then tests and fits."""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.config import TrainingConfig, parse_config
from polyhead.adapters.training.encode import DEFAULT_TEMPLATE, Encoder, pack
from polyhead.adapters.training.evaluate import EvalOptions, shots_of
from polyhead.adapters.training.factors import Source
from polyhead.adapters.training.fewshot import FitOptions, FitTask, fit
from polyhead.adapters.training.fewshot_prompted import fitting_shots, prompted_right
from polyhead.adapters.training.pretrain import StepReport, pretrain
from polyhead.adapters.training.scores import mean
from polyhead.adapters.training.skills import Routings, SharedSkills
from polyhead.adapters.training.sources import PrivateSource, RoutedSource
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.adapters.training.trainable import Trainable

TRIAL_STEPS = 24
TIMED_STEPS = 10
MICRO_TOKENS = 8192
SHOTS = EvalOptions(examples=32, shots=16)

Scores = dict[str, dict[str, float]]
"""Exact match by how it was answered and by task."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run was told, and where it tells what it found."""

    method: str
    seed: int
    told: dict[str, Any]
    began: float

    @property
    def out(self) -> Path:
        return Path(self.told["out"])

    def config(self, steps: int, name: str) -> TrainingConfig:
        """The same numbers trained whatever the method: LoRA holds all skills' rank in one."""
        heads, skills, rank = {
            "mhr": (8, 8, self.told["rank"]),
            "poly": (1, 8, self.told["rank"]),
            "lora": (1, 1, 8 * self.told["rank"]),
        }[self.method]
        lines = Path(self.told["train"]).read_text(encoding="utf-8").splitlines()
        known = {json.loads(line)["task"] for line in lines}
        suite = read_suite(Path(self.told["suite"]))
        tasks = len(known)
        return parse_config(
            {
                "backbone": self.told["backbone"],
                "output": self.out / f"{name}-{self.method}-{self.seed}",
                "method": self.method,
                "seed": self.seed,
                "data": {
                    "train": [self.told["train"]],
                    "templates": {one.name: one.template for one in suite if one.name in known},
                },
                "skills": {"heads": heads, "skills": skills, "rank": rank, "dtype": "bfloat16"},
                "optimiser": {"steps": steps, "rate": 0.003, "logits_rate": 0.1},
                "batch": {
                    "examples": max(1, self.told["examples"] // tasks) * tasks,
                    "tasks": tasks,
                    "bfloat16": self.told["bfloat16"],
                },
                "records": {"tensorboard": False, "checkpoint_every": steps, "every": 20},
            },
            "comparison",
        )

    def write(self, scores: dict[str, Scores], facts: dict[str, Any]) -> None:
        told = {"method": self.method, "seed": self.seed, **facts, "scores": scores}
        (self.out / f"run-{self.method}-{self.seed}.json").write_text(json.dumps(told))


def compute() -> None:
    method, seed, told = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    run = Run(method, seed, told, time.monotonic())
    inventory, facts = train(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loose: Any = AutoModelForCausalLM
    model = loose.from_pretrained(run.told["backbone"], dtype=torch.float32).to(device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(run.told["backbone"])
    tasks = read_suite(Path(run.told["suite"]))
    scores: dict[str, Scores] = {"training": trained(run, model, tokenizer, inventory, tasks)}
    run.write(scores, facts)
    scores["held out"] = {}
    held_out = [task for task in tasks if task.held_out]
    for way, found, seconds in fitted(run, model, tokenizer, inventory, held_out):
        scores["held out"][way] = found
        facts[f"seconds {way}"] = seconds
        run.write(scores, facts)


def train(run: Run) -> tuple[Inventory, dict[str, Any]]:
    """The trained inventory; how many steps there are is told by whoever started the runs."""
    seconds: list[float] = []

    def timed(step: StepReport) -> None:
        seconds.append(step.seconds)
        if step.step % 50 == 0:
            print(f"step {step.step}/{step.steps} loss {step.loss:.3f}", flush=True)

    backbone = Path(run.told["backbone"])
    if run.told["steps"] is None:
        pretrain(run.config(TRIAL_STEPS, "trial"), backbone, timed)
        each = statistics.mean(seconds[-TIMED_STEPS:])
        whole = run.out / f"{run.method}-{run.seed}.part"
        whole.write_text(str(each))
        whole.rename(whole.with_suffix(".seconds"))
    steps = run.out / "steps"
    while not steps.exists() or not steps.read_text():
        time.sleep(0.2)
    found = pretrain(run.config(int(steps.read_text()), "run"), backbone, timed)
    return found.inventory, {
        "steps": int(steps.read_text()),
        "trained_numbers": found.trained_numbers,
        "seconds a step": statistics.median(seconds),
        "loss": mean(list(found.losses.values())),
    }


def trained(
    run: Run, model: PreTrainedModel, tokenizer: Any, inventory: Inventory,
    tasks: Sequence[SuiteTask],
) -> Scores:  # fmt: skip
    """Training tasks under their own routings."""
    known = [task for task in tasks if task.name in inventory.tasks]
    routings = [inventory.tasks[task.name] for task in known]
    source = routed(inventory, routings, model)
    return {"trained": right(run, model, tokenizer, inventory, known, source)}


def fitted(
    run: Run, model: PreTrainedModel, tokenizer: Any, inventory: Inventory,
    tasks: Sequence[SuiteTask],
) -> Iterator[tuple[str, dict[str, float], float]]:  # fmt: skip
    """(way, exact match by task, seconds): held-out tasks after fitting 32 examples each."""
    own = {"poly": ["z"], "lora": []}
    ways = own.get(run.method, ["z", "mu", "lora", "base, 16 shots", "z, 200 steps", "mhr"])
    for way in ways:
        if time.monotonic() - run.began > run.told["seconds"] + run.told["fit_seconds"]:
            print(f"no time left for {way}", flush=True)
            return
        began = time.monotonic()
        if way == "base, 16 shots":
            found = prompted(run, model, tokenizer, tasks)
        else:
            found = _fitted(run, model, tokenizer, inventory, tasks, way)
        yield way, found, time.monotonic() - began
        print(f"{way}: {mean(list(found.values())):.3f}", flush=True)


def _fitted(
    run: Run, model: PreTrainedModel, tokenizer: Any, inventory: Inventory,
    tasks: Sequence[SuiteTask], way: str,
) -> dict[str, float]:  # fmt: skip
    method, _, longer = way.partition(", ")
    more: Any = {"steps": 200, "batch_examples": 8, "patience": 6} if longer else {}
    chosen = FitOptions(method=method, seed=run.seed, **more)  # type: ignore[arg-type]
    wanted = [
        FitTask(task.name, tuple(shots_of(task, SHOTS, run.seed)), task.template, chosen)
        for task in tasks
    ]
    results = {
        one.task: one for one in fit(model, inventory, tokenizer, wanted, micro_tokens=MICRO_TOKENS)
    }
    done = [task for task in tasks if task.name in results]
    if method == "z":
        routings = [results[task.name].routing for task in done]
        source = routed(inventory, [one for one in routings if one is not None], model)
        if run.method == "mhr" and run.seed == 0:
            torch.save({task.name: results[task.name].routing.values for task in done},  # type: ignore[union-attr]
                       run.out / f"{way.replace(', ', '-').replace(' ', '-')}.pt")  # fmt: skip
    else:
        source = private(inventory, [results[task.name].private for task in done], model)
    return right(run, model, tokenizer, inventory, done, source)


def prompted(
    run: Run, model: PreTrainedModel, tokenizer: Any, tasks: Sequence[SuiteTask]
) -> dict[str, float]:
    """The bare backbone with the instruction and 16 of the 32 examples before the question."""
    encoder = Encoder(tokenizer, DEFAULT_TEMPLATE)
    found = {}
    for task in tasks:
        shots = fitting_shots(tokenizer, encoder, shots_of(task, SHOTS, run.seed)[: SHOTS.shots])
        asked = task.test[: run.told["test"]]
        hits = prompted_right(
            model, tokenizer, encoder, shots, asked, lambda: None, task.description, MICRO_TOKENS
        )
        found[task.name] = mean([float(hit) for hit in hits])
    return found


def routed(inventory: Inventory, routings: Sequence[Routing], model: PreTrainedModel) -> Source:
    made = Routings(inventory.layout, len(routings))
    for row, one in enumerate(routings):
        if one.kind == "logits":
            made.logits.data[row] = one.values
        else:
            made.logits.data[row] = 0  # one skill alone, or all of them alike
    return RoutedSource(SharedSkills.of(inventory), made).to(model.device)


def private(
    inventory: Inventory, adapters: Sequence[PrivateAdapter | None], model: PreTrainedModel
) -> Source:
    """Their scaling is in B; the layers multiply by the inventory's."""
    own = [one for one in adapters if one is not None]
    scaling = inventory.header.scaling
    b = [{name: t / scaling for name, t in one.b.items()} for one in own]
    return PrivateSource.of(inventory.header.modules, [one.a for one in own], b).to(model.device)


@torch.inference_mode()
def right(
    run: Run, model: PreTrainedModel, tokenizer: Any, inventory: Inventory,
    tasks: Sequence[SuiteTask], source: Source,
) -> dict[str, float]:  # fmt: skip
    """Exact match of greedy decoding by task; the source's tasks are these, in this order."""
    header = inventory.header
    trainable = Trainable(model, header.modules, source, header.scaling)
    found: dict[str, float] = {}
    for number, task in enumerate(tasks):
        encoded = Encoder(tokenizer, task.template).encode(task.test[: run.told["test"]])
        hits = [hit for part in parts(encoded) for hit in _hits(trainable, part, number)]
        found[task.name] = mean([float(hit) for hit in hits])
    trainable.detach()
    return found


def _hits(trainable: Trainable, part: Sequence[Encoded], task: int) -> list[bool]:
    batch = pack(part, [task] * len(part)).to(trainable.model.device)
    exact: list[bool] = trainable.score(batch)[0].tolist()
    return exact


def parts(encoded: Sequence[Encoded]) -> list[Sequence[Encoded]]:
    """At most about `MICRO_TOKENS` in each."""
    each = max(1, MICRO_TOKENS // max(map(len, encoded)))
    return [encoded[i : i + each] for i in range(0, len(encoded), each)]


if __name__ == "__main__":
    compute()
