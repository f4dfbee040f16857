"""Tokens per CPU second: the engine bare and routed, PEFT Poly, transformers' `generate` and its
continuous batching.

    python -m benchmarks.throughput --backbone data/SmolLM2-135M-Instruct --dtype float32

64 requests of 32–128 prompt and 32–64 new tokens; every side answers the same ones.
"""

import functools
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.sides import ContinuousSide, EngineSide, GenerateSide, generate_model
from benchmarks.workload import VOCABULARY, make_work
from polyhead.server.engine.backbone import DTYPES

POLY_TASKS = 16
CONTINUOUS_TOKENS = 512
"""Of a step; with 128 it is as fast."""


def main(
    backbone: options.Backbone = options.BACKBONE,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    requests: int = 64,
    rounds: int = 3,
    threads: int = 1,
    seats: Annotated[int, typer.Option(help="Sequences in the engine's batch")] = 32,
    tasks: Annotated[list[int], typer.Option(help="Routed runs, by number of tasks")] = [1, 16, 64],  # noqa: B006
    generate_batches: list[int] = [16, 32, 64],  # noqa: B006
    poly_batches: list[int] = [16, 32],  # noqa: B006
    continuous: Annotated[
        bool, typer.Option(help="transformers' continuous batching as well, as many seats")
    ] = True,
) -> None:
    torch.set_num_threads(threads)
    console = Console(width=110)
    precision = DTYPES[dtype]

    def work(count: int) -> list:  # type: ignore[type-arg]
        return make_work(requests, count, vocabulary=VOCABULARY)

    bare = EngineSide(backbone, precision, routed=False, seats=seats)
    routed = EngineSide(backbone, precision, routed=True, seats=seats)
    plain, poly = (
        generate_model(backbone, precision),
        generate_model(backbone, precision, POLY_TASKS),
    )
    sides = {"engine, bare": functools.partial(bare, work(1))}
    sides |= {f"engine, {n} tasks": functools.partial(routed, work(n)) for n in tasks}
    sides |= {
        f"generate, batch {n}": functools.partial(GenerateSide(plain, batch=n), work(1))
        for n in generate_batches
    }
    sides |= {
        f"PEFT Poly, batch {n}": functools.partial(GenerateSide(poly, batch=n), work(POLY_TASKS))
        for n in poly_batches
    }
    batching = None
    if continuous:  # on a model of its own, whose attention it exchanges
        model = generate_model(backbone, precision)
        batching = ContinuousSide(model, seats=seats, step_tokens=CONTINUOUS_TOKENS)
        sides["continuous batching"] = functools.partial(batching, work(1))
    tokens = sum(item.new_tokens for item in work(1))
    runs = timing.run_in_turn(sides, rounds, console)
    rates = {name: timing.rates(found, tokens) for name, found in runs.items()}
    rows = [
        (name, timing.spread(values), timing.ratio(values, rates["engine, bare"]))
        for name, values in rates.items()
    ]
    title = f"{dtype}, {requests} requests, {threads} thread(s), {seats} seats\n{timing.machine()}"
    timing.print_table(console, title, ("side", "tokens / CPU s", "over bare engine"), rows)
    _print_goals(console, rates)
    for side in (bare, routed):
        side.engine.stop()
    if batching is not None:
        batching.stop()


def _print_goals(console: Console, rates: dict[str, list[float]]) -> None:
    def best(prefix: str) -> str:
        return max((n for n in rates if n.startswith(prefix)), key=lambda n: sum(rates[n]))

    pairs = [
        ("engine, 16 tasks", best("PEFT Poly"), "2.0"),
        ("engine, 16 tasks", "engine, bare", "0.75"),
        ("engine, 64 tasks", "engine, 1 tasks", "0.9"),
        ("engine, bare", best("generate"), "1.1"),
    ]
    rows = [
        (above, below, timing.ratio(rates[above], rates[below]), f">= {goal}")
        for above, below, goal in pairs
        if above in rates and below in rates
    ]
    columns = ("side", "over", "ratio", "goal")
    timing.print_table(console, "Goals", columns, rows)


if __name__ == "__main__":
    typer.run(main)
