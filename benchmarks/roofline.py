"""What a decode step needs at least on this machine, and what it takes: a roofline by part.

    python -m benchmarks roofline --backbone data/SmolLM2-135M-Instruct

Peaks are measured first, on one thread: reading memory, and oneDNN's bfloat16 products. Each part
of a step (the backbone's products, attention, the adapters' part) then needs the longer of the time
for its bytes and the time for its operations. What steps take is the least of many: what disturbs
only ever adds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from benchmarks import options, timing
from benchmarks.sides import RANK, SKILLS, EngineSide
from benchmarks.workload import VOCABULARY, Work, make_work
from polyhead.server.engine.step_record import StepRecord

BYTES = 2  # of a bfloat16 number
NEW = 48
PARTS = ("backbone", "attention", "adapters")


@dataclass(frozen=True)
class Peaks:
    bandwidth: float  # bytes per second, reading
    operations: float  # per second, a multiplication and an addition being two


@dataclass(frozen=True)
class Need:
    """What a part of a step reads and computes."""

    bytes: float
    operations: float

    def seconds(self, peaks: Peaks) -> float:
        return max(self.bytes / peaks.bandwidth, self.operations / peaks.operations)


def main(
    backbone: options.Backbone = options.BACKBONE,
    rows: int = 64,
    context: Annotated[int, typer.Option(help="Tokens of each row, about")] = 96,
    tasks: Annotated[list[int], typer.Option(help="Of routed steps")] = [1, 16, 64],  # noqa: B006
) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    peaks = measure_peaks()
    config = AutoConfig.from_pretrained(backbone)
    table = []
    for count in [0, *tasks]:
        found, form = measure_steps(backbone, rows, context, count)
        needs = {"backbone": products(config, rows), "attention": attention(config, rows, context)}
        if count:
            needs["adapters"] = adapters(config, rows, count, form == "factored")
        least = {name: need.seconds(peaks) for name, need in needs.items()}
        table.append(line(count, form, least, found))
    title = (
        f"A decode step of {rows} rows of about {context} tokens, bfloat16, 1 thread; reading "
        f"{peaks.bandwidth / 1e9:.1f} GB/s, products {peaks.operations / 1e9:.0f} GFLOP/s\n"
    )
    columns = ("tasks", "form", *PARTS, "needs, ms", "takes, ms", "share")
    timing.print_table(console, title + timing.machine(), columns, table)


def line(tasks: int, form: str, least: dict[str, float], found: list[float]) -> tuple[str, ...]:
    parts = [f"{least[name] * 1e3:.1f}" if name in least else "" for name in PARTS]
    needed, taken = sum(least.values()), min(found)
    takes = f"{taken * 1e3:.0f} (median {statistics.median(found) * 1e3:.0f})"
    shown = str(tasks) if tasks else "bare"
    return (shown, form, *parts, f"{needed * 1e3:.0f}", takes, f"{needed / taken:.2f}")


def measure_peaks() -> Peaks:
    source = torch.ones(64 << 20)
    moved = source.nbytes / _least(lambda: source.sum())
    x, weight = torch.ones(256, 1024).bfloat16(), torch.ones(1024, 1024).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    product: Callable[..., object] = torch.ops.mkldnn._linear_pointwise
    seconds = _least(lambda: product(x, packed, None, "none", [], ""))
    return Peaks(moved, 2 * x.numel() * len(weight) / seconds)


def _least(run: Callable[[], object], repeats: int = 30) -> float:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def _linears(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's linear layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = size * config.num_attention_heads, size * config.num_key_value_heads
    own = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*own, (hidden, inner), (hidden, inner), (inner, hidden)]


def products(config: PreTrainedConfig, rows: int) -> Need:
    layers = config.num_hidden_layers * sum(i * o for i, o in _linears(config))
    numbers = layers + config.hidden_size * config.vocab_size
    return Need(BYTES * numbers, 2 * rows * numbers)


def attention(config: PreTrainedConfig, rows: int, context: int) -> Need:
    keys, queries = _linears(config)[1][1], _linears(config)[0][1]
    pairs = rows * context * config.num_hidden_layers
    return Need(2 * BYTES * pairs * keys, 4 * pairs * queries)


def adapters(config: PreTrainedConfig, rows: int, tasks: int, factored: bool) -> Need:
    """Combined: the factors of every task. Factored: every skill, for every row."""
    widths = config.num_hidden_layers * sum(i + o for i, o in _linears(config))
    copies = SKILLS if factored else tasks
    computed = SKILLS if factored else 1
    return Need(BYTES * RANK * widths * copies, 2 * rows * RANK * widths * computed)


def measure_steps(backbone: Path, rows: int, context: int, tasks: int) -> tuple[list[float], str]:
    """Seconds of the forward pass of every step in which all rows decode, and the form of most."""
    found: list[StepRecord] = []
    side = EngineSide(
        backbone,
        torch.bfloat16,
        routed=tasks > 0,
        seats=rows,
        step_tokens=rows * context,  # all prompts in one step, so that all rows decode together
        watch=found.append,
    )
    length = context - NEW // 2
    work: list[Work] = make_work(
        rows, max(tasks, 1), vocabulary=VOCABULARY, prompt=(length, length), new_tokens=(NEW, NEW)
    )
    for _ in range(2):  # the first builds factors
        found.clear()
        side(work)
    side.engine.stop()
    full = [record for record in found if record.rows == record.tokens == rows]
    forms = full[-1].forms
    seen = max(("combined", "factored"), key=lambda form: forms.get(form, 0))
    return [record.seconds["forward"] for record in full], seen if tasks else "none"


if __name__ == "__main__":
    typer.run(main)
