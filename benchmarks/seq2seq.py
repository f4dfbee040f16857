"""Tokens per CPU second of a T5: the engine, PEFT Poly, and transformers' `generate`.

    python -m benchmarks.seq2seq --backbone small

64 requests of 32–128 source and 32–64 new tokens, every side answers the same ones. The method has
the shape of the published T0 inventories: r = 1, S = 8, H = 64 on q, k, v, o, wi, wo. The backbone
has the shape of T5-small or T5-base; its weights are random, which no timing depends on.
"""

import copy
import functools
import time
from typing import Annotated, Any, cast

import torch
import typer
from peft import PolyConfig, get_peft_model
from rich.console import Console
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks import timing
from benchmarks.sides import Driven, GenerateSide
from benchmarks.workload import Work, make_work
from polyhead.adapters.inject import find_modules, inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.plan import RoutedTask
from polyhead.server.engine.backbone import DTYPES
from polyhead.server.engine.cpu_norms import compile_norms
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.packed_linears import pack_linears
from polyhead.server.engine.request import Request, SamplingParams
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.source_cache import SourceCache
from polyhead.server.engine.source_runner import SourceRunner
from polyhead.server.engine.step_record import StepRecord
from polyhead.server.engine.tokenizer import Tokenizer

TARGETS = ["q", "k", "v", "o", "wi", "wo"]
RANK, SKILLS, HEADS, TASKS = 1, 8, 64, 16
VOCABULARY = 32128
SHAPES = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
START = 0
LONG = 2048


def random_t5(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=START, **SHAPES[shape])
    model: Any = T5ForConditionalGeneration(config).to(dtype).eval()
    frozen: PreTrainedModel = model.requires_grad_(False)
    return frozen


def poly(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """A copy with PEFT's Poly layers."""
    config = PolyConfig(
        r=RANK,
        n_tasks=TASKS,
        n_skills=SKILLS,
        n_splits=HEADS,
        target_modules=TARGETS,
        task_type="SEQ_2_SEQ_LM",
    )
    return get_peft_model(copy.deepcopy(model), config).to(dtype).eval()


class SourceSide(Driven):
    """Polyhead's engine over a T5. routed=False leaves it bare, whole encodes every source in one
    step, however long."""

    def __init__(
        self,
        bare: PreTrainedModel,
        *,
        routed: bool,
        seats: int,
        step_tokens: int,
        whole: bool = False,
    ) -> None:
        self.steps: list[float] = []  # their CPU seconds
        model = copy.deepcopy(bare)
        pack_linears(model)
        compile_norms(model)
        injection = None
        if routed:
            modules = find_modules(model, TARGETS, heads=HEADS)
            inventory = Inventory.random(
                BackboneRef.of(model, "t5"), modules, heads=HEADS, skills=SKILLS, rank=RANK
            )
            injection = inject(model, inventory)
        super().__init__(injection)
        space = KVSpace(65536, 2048, parking=True)
        config = SchedulerConfig(seats, max(seats, step_tokens))
        depth = 1 if whole else len(cast(Any, model).encoder.block)
        sources = SourceCache(space, 0, step_tokens=config.max_step_tokens, depth=depth)
        runner = SourceRunner(model, injection, space.capacities)
        scheduler = Scheduler(config, space, sources)
        self.start(Engine(runner, scheduler, _tokenizer(), self.receive, watch=self._stepped))
        self._spent = time.process_time()

    def _stepped(self, record: StepRecord) -> None:
        del record
        spent = time.process_time()
        self.steps.append(spent - self._spent)
        self._spent = spent

    def request(self, name: str, item: Work, task: RoutedTask | None) -> Request:
        params = SamplingParams(max_tokens=item.new_tokens, ignore_eos=True)
        label = f"task-{item.task}"
        return Request(name, label, label, (START,), task, params, source=item.prompt)


def _tokenizer() -> Tokenizer:
    """As many words as a T5 has tokens."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    fast = FastTokenizer(models.WordLevel(words, unk_token="w2"))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast), decoder_start=START)


def main(
    backbone: Annotated[str, typer.Option(help="Its shape: small or base")] = "small",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    requests: int = 64,
    rounds: int = 3,
    threads: int = 1,
    seats: Annotated[int, typer.Option(help="Sequences in the engine's batch")] = 64,
    step_tokens: Annotated[int, typer.Option(help="The engine computes in a step")] = 512,
    batches: Annotated[list[int], typer.Option(help="Of both `generate` and Poly")] = [16, 64],  # noqa: B006
) -> None:
    torch.set_num_threads(threads)
    console = Console(width=110)
    precision = DTYPES[dtype]
    model = random_t5(backbone, precision)
    work = make_work(requests, TASKS, vocabulary=VOCABULARY)
    how = {"seats": seats, "step_tokens": step_tokens}
    bare, routed = (SourceSide(model, routed=routed, **how) for routed in (False, True))
    sides = {"engine, bare": bare, f"engine, {TASKS} tasks": routed}
    pairs = [("generate", model), ("PEFT Poly", poly(model, precision))]
    answering = {name: functools.partial(side, work) for name, side in sides.items()}
    answering |= {
        f"{name}, batch {n}": functools.partial(GenerateSide(own, batch=n), work)
        for name, own in pairs
        for n in batches
    }
    for warmed in answering.values():
        warmed.func(work[:2])
    runs = timing.run_in_turn(answering, rounds, console)
    rates = {n: timing.rates(found, sum(w.new_tokens for w in work)) for n, found in runs.items()}
    base = rates["engine, bare"]
    rows = [(n, timing.spread(v), timing.ratio(v, base)) for n, v in rates.items()]
    head = f"T5-{backbone}, {dtype}, {requests} requests, {threads} thread(s), {seats} seats"
    columns = ("side", "tokens / CPU s", "over bare engine")
    timing.print_table(console, f"{head}\n{timing.machine()}", columns, rows)
    _print_goals(console, rates)
    for side in sides.values():
        side.engine.stop()
    _print_stalls(console, model, rounds, seats)


def _print_stalls(console: Console, model: PreTrainedModel, rounds: int, seats: int) -> None:
    """What a long source does to those who decode beside it, at the server's own step size."""
    short = make_work(16, TASKS, vocabulary=VOCABULARY)
    (long,) = make_work(1, 1, vocabulary=VOCABULARY, prompt=(LONG, LONG), new_tokens=(8, 8))
    rows = []
    for name, whole in (("in one step", True), ("in portions of layers", False)):
        side = SourceSide(model, routed=True, seats=seats, step_tokens=128, whole=whole)
        side([*short[:2], long])
        longest = []
        for _ in range(rounds):
            side.steps.clear()
            side([*short, long])
            longest.append(max(side.steps))
        side.engine.stop()
        rows.append((name, timing.spread(longest)))
    columns = (f"source of {LONG} tokens", "longest step, CPU s")
    timing.print_table(console, "Beside 16 short requests, 128 tokens a step", columns, rows)


def _print_goals(console: Console, rates: dict[str, list[float]]) -> None:
    best = max((n for n in rates if n.startswith("PEFT")), key=lambda n: sum(rates[n]))
    found = timing.ratio(rates[f"engine, {TASKS} tasks"], rates[best])
    row = (f"engine, {TASKS} tasks", best, found, ">= 2")
    timing.print_table(console, "Goal", ("side", "over", "ratio", "goal"), [row])


if __name__ == "__main__":
    typer.run(main)
