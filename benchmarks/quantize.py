"""Quantised backbones beside the bfloat16 one: agreement, bytes, tokens per CPU second, loading.

    python -m benchmarks quantize --suite data/suite

Agreement is teacher forced: at every place of an answer where the backbone is asked for the next
token, is the likeliest one the same, and how far are the two distributions apart? The prompts are
the suite's, each routed by its own task of the inventory. The control is the bfloat16 backbone with
the next task's routing, which must agree less.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import options, timing
from benchmarks.sides import CPU, EngineSide
from benchmarks.workload import VOCABULARY, make_work
from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import RoutedTask, use_plan
from polyhead.adapters.training.encode import Encoded, Encoder
from polyhead.adapters.training.suite import SuiteTask, read_suite
from polyhead.server.engine.backbone import load_backbone
from polyhead.server.engine.packed_linears import pack_linears
from polyhead.server.engine.quantized import quantize_linears

BITS = (None, "int8", "int4")
LOADS = 5


@dataclass(frozen=True)
class Question:
    """One test example in tokens, with its own task and another one's."""

    ids: Tensor  # [1, N], prompt and answer
    answer: int  # where it begins
    own: RoutedTask
    other: RoutedTask


@dataclass
class Agreement:
    """Over all places of all answers."""

    same: list[bool] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)  # KL(bfloat16 || this), in nats

    def add(self, right: Tensor, found: Tensor) -> None:
        """Log-probabilities `[n, V]` of both."""
        self.same += (right.argmax(-1) == found.argmax(-1)).tolist()
        self.divergences += (right.exp() * (right - found)).sum(-1).tolist()

    def row(self, name: str) -> tuple[str, ...]:
        worst = timing.quantile(self.divergences, 0.99)
        same = f"{mean(self.same):.3f}"
        return name, same, f"{mean(self.divergences):.4f}", f"{worst:.3f}", str(len(self.same))


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    suite: Annotated[Path, typer.Option(help="Folder of the tasks, as `make suite` builds it")] = (
        Path("data/suite")
    ),
    examples: Annotated[int, typer.Option(help="Test examples of each task")] = 8,
    requests: Annotated[int, typer.Option(help="Of the engine's runs")] = 32,
    rounds: int = 2,
    seats: int = 32,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    rows = [load_row(backbone, wanted) for wanted in BITS]
    columns = ("backbone", "MB of weights", "as loaded s", "quantising s", "packing s", "MB served")
    timing.print_table(console, f"Loading, one thread\n{timing.machine()}", columns, rows)
    skills = Inventory.load(inventory)
    questions = read_questions(backbone, skills, read_suite(suite), examples)
    agreed = [(name, found.row(name)) for name, found in agreements(backbone, skills, questions)]
    columns = ("backbone", "same likeliest", "mean KL", "99th percentile", "places")
    timing.print_table(console, f"{len(questions)} answers", columns, [row for _, row in agreed])
    speeds(backbone, console, requests, rounds, seats)


def load_row(backbone: Path, wanted: str | None) -> tuple[str, ...]:
    """What loading takes without imports, and the bytes of a server's weights: the median of some
    loads whose file is in the system's cache."""
    took: list[tuple[float, float, float]] = []
    for _ in range(LOADS):
        begun = time.perf_counter()
        model = load_backbone(backbone, torch.bfloat16, CPU)
        loaded = time.perf_counter()
        if wanted is not None:
            quantize_linears(model, wanted)
        changed = time.perf_counter()
        packed = _copies(model) if pack_linears(model) else 0
        took.append((loaded - begun, changed - loaded, time.perf_counter() - changed))
    held = bytes_of(model)
    seconds = [f"{median(column):.2f}" for column in zip(*took, strict=True)]
    return _name(wanted), f"{held / 1e6:.0f}", *seconds, f"{(held + packed) / 1e6:.0f}"


def bytes_of(model: PreTrainedModel) -> int:
    """Of all parameters, each once."""
    parts = [plain for parameter in model.parameters() for plain in _plain(parameter)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def _plain(tensor: Any) -> list[Tensor]:
    """The tensors that one of torchao's is made of, or that tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [
        part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))
    ]


def _copies(model: PreTrainedModel) -> int:
    """Bytes of the weights that `pack_linears` reorders a copy of."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    return sum(m.weight.nbytes for m in layers if type(m.weight) is torch.nn.Parameter)


def read_questions(
    backbone: Path, skills: Inventory, tasks: Sequence[SuiteTask], examples: int
) -> list[Question]:
    """Of the suite's tasks that the inventory has a routing for."""
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
    known = [task for task in tasks if task.name in skills.tasks]
    weights = [skills.tasks[task.name].weights(skills.layout) for task in known]
    routed = [RoutedTask(t.name, w) for t, w in zip(known, weights, strict=True)]
    found = []
    for number, task in enumerate(known):
        encoder = Encoder(tokenizer, skills.templates.get(task.name, task.template))
        other = routed[(number + 1) % len(known)]
        encoded = encoder.encode(task.test[:examples])
        found += [_question(one, routed[number], other) for one in encoded]
    return found


def _question(one: Encoded, own: RoutedTask, other: RoutedTask) -> Question:
    ids = torch.tensor([[*one.prompt, *one.answer]])
    return Question(ids, len(one.prompt), own, other)


@torch.inference_mode()
def agreements(
    backbone: Path, skills: Inventory, questions: Sequence[Question]
) -> list[tuple[str, Agreement]]:
    """Of the control and of each quantised backbone with the one in bfloat16."""
    plain = _injected(backbone, skills, None)
    right = [answered(plain, question, question.own) for question in questions]
    control = Agreement()
    for question, expected in zip(questions, right, strict=True):
        control.add(expected, answered(plain, question, question.other))
    found = [("bfloat16, another task", control)]
    for wanted in BITS[1:]:
        model, own = _injected(backbone, skills, wanted), Agreement()
        for question, expected in zip(questions, right, strict=True):
            own.add(expected, answered(model, question, question.own))
        found.append((_name(wanted), own))
    return found


def _injected(
    backbone: Path, skills: Inventory, wanted: str | None
) -> tuple[PreTrainedModel, Injection]:
    model = load_backbone(backbone, torch.bfloat16, CPU)
    if wanted is not None:
        quantize_linears(model, wanted)
    return model, inject(model, skills)


def answered(
    served: tuple[PreTrainedModel, Injection], question: Question, task: RoutedTask
) -> Tensor:
    """Log-probabilities `[n, V]` of the answer's n tokens."""
    model, injection = served
    with use_plan(injection.plan([task], [question.ids.shape[1]])):
        logits = model(question.ids).logits[0, question.answer - 1 : -1]
    return logits.float().log_softmax(-1)


def speeds(backbone: Path, console: Console, requests: int, rounds: int, seats: int) -> None:
    """Tokens per CPU second of the engine with 16 tasks; the sides take turns."""
    work = make_work(requests, 16, vocabulary=VOCABULARY)
    tokens = sum(item.new_tokens for item in work)
    setting: dict[str, Any] = {"routed": True, "seats": seats}
    made = {w: EngineSide(backbone, torch.bfloat16, quantize=w, **setting) for w in BITS}
    sides = {_name(wanted): lambda side=side: side(work) for wanted, side in made.items()}
    runs = timing.run_in_turn(sides, rounds, console)
    rates = {name: timing.rates(found, tokens) for name, found in runs.items()}
    rows = [
        (name, timing.spread(own), timing.ratio(own, rates[_name(None)]))
        for name, own in rates.items()
    ]
    title = f"{requests} requests, 16 tasks, {seats} seats, 1 thread"
    timing.print_table(console, title, ("backbone", "tokens / CPU s", "over bfloat16"), rows)
    for side in made.values():
        side.engine.stop()


def _name(wanted: str | None) -> str:
    return wanted or "bfloat16"


if __name__ == "__main__":
    typer.run(main)
