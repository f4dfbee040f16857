"""What a long prompt does to the gaps between others' tokens, and what the step's budget allows.

    python -m benchmarks long_prompt --backbone data/SmolLM2-135M-Instruct

Some requests decode while prompts of 2,000 tokens are computed, one after another, in chunks: a
step takes at most its budget of tokens, and every decoding request gets its token in each. So a gap
should be no longer than a step that decodes and one of the whole budget for a prompt alone.
"""

from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.sides import EngineSide
from benchmarks.workload import VOCABULARY, make_work
from polyhead.server.engine.step_record import StepRecord

TASKS = 16
KINDS = ("decoding", "with a prompt", "a prompt alone")


def main(
    backbone: options.Backbone = options.BACKBONE,
    rows: Annotated[int, typer.Option(help="Requests that decode")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a long prompt")] = 2000,
    prompts: Annotated[int, typer.Option(help="Long prompts, one after another")] = 2,
    budget: Annotated[int, typer.Option(help="Tokens of a step")] = 128,
    rounds: int = 3,
) -> None:
    torch.set_num_threads(1)
    console, steps = Console(width=110), list[StepRecord]()
    side = EngineSide(
        backbone,
        torch.bfloat16,
        routed=True,
        seats=rows + 1,
        step_tokens=budget,
        watch=steps.append,
    )
    long = make_work(prompts, 1, vocabulary=VOCABULARY, prompt=(length, length), new_tokens=(1, 1))
    lasting = 32 + prompts * length // (budget - rows)
    work = make_work(
        rows, TASKS, vocabulary=VOCABULARY, prompt=(32, 32), new_tokens=(lasting, lasting)
    )
    kinds: dict[str, list[list[float]]] = {
        "decoding": [],
        "with a prompt": [],
        "a prompt alone": [],
    }
    for _ in range(rounds):
        steps.clear()
        side([*work, *long])
        kinds["decoding"].append(_seconds(steps, rows, rows))
        kinds["with a prompt"].append(_seconds(steps, rows + 1, budget))
        steps.clear()
        side(long[:1])
        kinds["a prompt alone"].append(_seconds(steps, 1, budget))
    side.engine.stop()
    _report(console, kinds, f"{rows} requests of {TASKS} tasks, {budget} tokens a step")


def _seconds(steps: list[StepRecord], rows: int, tokens: int) -> list[float]:
    """Of whole steps of so many rows and tokens."""
    own = [step for step in steps if (step.rows, step.tokens) == (rows, tokens)]
    return [sum(step.seconds.values()) for step in own]


def _report(console: Console, kinds: dict[str, list[list[float]]], title: str) -> None:
    rows = []
    at = {name: [timing.quantile(own, 0.99) for own in runs] for name, runs in kinds.items()}
    for name, runs in kinds.items():
        middle = [timing.quantile(own, 0.5) * 1e3 for own in runs]
        rows.append((name, timing.spread(middle), timing.spread([p * 1e3 for p in at[name]])))
    columns = ("steps", "median, ms", "p99, ms")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)
    allowed = [a + b for a, b in zip(at["decoding"], at["a prompt alone"], strict=True)]
    found = timing.ratio(at["with a prompt"], allowed)
    console.print(
        f"p99 with a prompt over decoding and the budget's worth: {found} (goal: at most 1)"
    )


if __name__ == "__main__":
    typer.run(main)
