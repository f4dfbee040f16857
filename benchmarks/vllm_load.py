"""Goodput over HTTP beside vLLM's OpenAI server on the CPU, with a LoRA for each task.

    python -m benchmarks vllm_load --rates 1,2,3,4 --vllm-rates 0.5,1,1.5,2

Both servers compute on one thread in bfloat16 and know the same 200 tasks of a random inventory:
ours as routings, vLLM's each materialised as a LoRA, 16 of them in a batch. Arrivals, prompts and
lengths at a rate are the same. An answer is good when it came whole and kept both targets; a client
leaves after `--limit` seconds. What is compared is each server's goodput at its best rate.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.load import figures, numbers, random_logits, register
from benchmarks.load_client import plan, send
from benchmarks.serving import TICKS, free_port, serving
from benchmarks.sides import CPU, HEADS, RANK, SKILLS
from benchmarks.simulated import Load
from benchmarks.tool_environment import environment
from benchmarks.vllm import REQUIREMENT, UNUSED
from polyhead.adapters.inject import find_modules
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.materialise import own_factors, peft_folder
from polyhead.adapters.routing import Routing
from polyhead.server.engine.backbone import load_backbone

NAMES = "load-%d"
COLUMNS = (
    "rate", "sent", "answered/s", "goodput/s", "tokens/s", "first token ms p50", "p99",
    "mean gap ms p50", "p99 of gaps", "refused", "CPU s",
)  # fmt: skip
# One compute thread; the API server is a process of its own beside the engine's.
VLLM_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Side:
    """A running server."""

    url: str
    pid: int


@dataclass(frozen=True)
class Asking:
    """How the servers are loaded and judged."""

    tasks: int
    alpha: float
    cv: float
    seconds: float  # of arrivals at each rate
    targets: tuple[float, float]
    limit: float


def main(
    backbone: options.Backbone = options.BACKBONE,
    rates: Annotated[str, typer.Option(help="Requests per second for ours")] = "1,2,3,4",
    vllm_rates: Annotated[str, typer.Option(help="And for vLLM")] = "0.5,1,1.5,2",
    tasks: int = 200,
    alpha: Annotated[float, typer.Option(help="Exponent of the tasks' popularity")] = 1.0,
    cv: Annotated[float, typer.Option(help="Of the pauses between arrivals")] = 4.0,
    seconds: Annotated[float, typer.Option(help="Of arrivals in each run")] = 45.0,
    first_token: Annotated[float, typer.Option(help="Target in seconds")] = 5.0,
    gap: Annotated[float, typer.Option(help="Target of the mean gap in seconds")] = 1.0,
    limit: Annotated[float, typer.Option(help="Seconds until a client leaves")] = 60.0,
    max_wait: Annotated[float, typer.Option(help="--max-wait-seconds of our server")] = 5.0,
    max_num_seqs: Annotated[int, typer.Option(help="Of vLLM")] = 32,
    eager: Annotated[bool, typer.Option(help="Whether vLLM leaves its model uncompiled")] = False,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=150)
    asking = Asking(tasks, alpha, cv, seconds, (first_token, gap), limit)
    python = environment("vllm", REQUIREMENT, without=UNUSED) / "python"
    with tempfile.TemporaryDirectory() as folder:
        inventory = write_inventory(backbone, Path(folder) / "inventory")
        with ours(backbone, inventory, Path(folder) / "data", tasks, max_wait) as side:
            own = measure("ours", side, asking, numbers(rates), console)
        loras = write_loras(inventory, Path(folder), tasks)
        engine = ["--max-num-seqs", str(max_num_seqs), *(["--enforce-eager"] if eager else [])]
        with vllm_server(python, backbone, loras, engine, Path(folder) / "log") as side:
            other = measure("vLLM", side, asking, numbers(vllm_rates), console)
    title = f"targets: {first_token:g} s to the first token, mean gap {gap:g} s"
    console.print(f"{title}; load {os.getloadavg()[0]:.1f}\n{timing.machine()}")
    best = max(own), max(other)
    console.print(
        f"goodput/s: ours {best[0]:.3g}, vLLM {best[1]:.3g}, ratio {best[0] / best[1]:.2f}"
    )


def write_inventory(backbone: Path, folder: Path) -> Path:
    """Random skills over all linear layers, as in `vllm`."""
    model = load_backbone(backbone, torch.bfloat16, CPU)
    reference = BackboneRef.of(model, backbone.name)
    modules = find_modules(model, heads=HEADS)
    sizes = {"heads": HEADS, "skills": SKILLS, "rank": RANK}
    Inventory.random(reference, modules, **sizes, std=0.01).save(folder)
    return folder


def write_loras(inventory: Path, folder: Path, tasks: int) -> list[str]:
    """Every task as a PEFT folder, as vLLM's `--lora-modules` wants them: `name=path`."""
    skills = Inventory.load(inventory)
    header, layout, told = skills.header, skills.layout, []
    for number, logits in enumerate(random_logits(tasks, header.heads, header.skills)):
        routing = Routing.from_nested(logits, layout, granularity="model")
        own = folder / (NAMES % number)
        own.mkdir()
        adapter = own_factors(skills, routing.weights(layout))
        for name, data in peft_folder(adapter, header.backbone.name).items():
            (own / name).write_bytes(data)
        told.append(f"{NAMES % number}={own}")
    return told


@contextlib.contextmanager
def ours(
    backbone: Path, inventory: Path, data: Path, tasks: int, max_wait: float
) -> Iterator[Side]:
    flags = ("--threads", "1", "--dtype", "bfloat16", "--max-wait-seconds", f"{max_wait:g}")
    with serving(backbone, inventory, data, *flags) as served:
        register(served, NAMES, tasks)
        yield Side(f"http://127.0.0.1:{served.port}", served.pid)


@contextlib.contextmanager
def vllm_server(
    python: Path, backbone: Path, loras: Sequence[str], engine: Sequence[str], log: Path
) -> Iterator[Side]:
    """Its `vllm` command fails on the CPU; the module does the same."""
    port = free_port()
    command = [
        python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", backbone.resolve(),
        "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16", "--max-model-len", 2048,
        "--enable-lora", "--max-loras", 16, "--max-lora-rank", RANK, "--max-cpu-loras", len(loras),
        *engine, "--disable-log-stats", "--uvicorn-log-level", "error", "--lora-modules", *loras,
    ]  # fmt: skip
    with (
        log.open("wb") as written,
        subprocess.Popen(
            list(map(str, command)),
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, **VLLM_ENVIRONMENT},
        ) as process,
    ):
        try:
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    sys.exit(f"vLLM did not start: {log.read_text()[-3000:]}")
                time.sleep(1)
            yield Side(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()  # its engine's process ends with it


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def measure(
    name: str, side: Side, asking: Asking, rates: Sequence[float], console: Console
) -> list[float]:
    """Goodput by rate, per second of arrivals: a client's leaving bounds what comes after."""
    models = [NAMES % number for number in range(asking.tasks)]
    warm = plan(Load(1.0, asking.tasks, asking.alpha, 1.0), 8.0, seed=1)
    send(side.url, models, warm, asking.limit)
    rows = []
    for rate in rates:
        planned = plan(Load(rate, asking.tasks, asking.alpha, asking.cv), asking.seconds)
        before = cpu_seconds(side.pid)
        answered = send(side.url, models, planned, asking.limit)
        took = {"rate": rate, "CPU s": cpu_seconds(side.pid) - before}
        rows.append({**took, **figures(answered, asking.seconds, asking.targets)})
        console.log(f"{name} {rate:g}/s: {rows[-1]}")
    cells = [[f"{row[column]:.3g}" for column in COLUMNS] for row in rows]
    timing.print_table(console, name, COLUMNS, cells)
    return [row["goodput/s"] for row in rows]


def cpu_seconds(pid: int) -> float:
    """What a process and those that it started have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    begun = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    own = (int(fields[11]) + int(fields[12])) / TICKS
    return own + sum(cpu_seconds(int(child)) for children in begun for child in children)


if __name__ == "__main__":
    typer.run(main)
