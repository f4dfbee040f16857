"""What thousands of registered tasks cost: memory, and the time of a step.

    python -m benchmarks.memory

Two servers over the same backbone take turns: one whose registry holds `--tasks` random routings,
and one that holds only the few that the measured work uses, which the first holds too.
"""

import concurrent.futures
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import options, timing
from benchmarks.serving import Memory, Served, serving
from benchmarks.workload import VOCABULARY, Work, make_work
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Routing
from polyhead.server.tasks.registry import Registry

WORKING = 16
"""Tasks that the measured work uses, and its requests."""
MIXED = 64
"""Tasks of one mixture: the most that a server takes by default."""
GOAL_BYTES = 1e9


@dataclass(frozen=True)
class Rate:
    """Tokens of one run of the work, per second of the clock and of the server's CPU time."""

    wall: float
    cpu: float


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    tasks: Annotated[int, typer.Option(help="Registered tasks of the full server")] = 10_000,
    rounds: int = 4,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each request of the work")] = 32,
    cache_bytes: Annotated[int, typer.Option(help="What resident tasks may take")] = 768 << 20,
    threads: Annotated[int, typer.Option(help="Compute threads of each server")] = 1,
) -> None:
    console = Console(width=110)
    flags = ("--threads", str(threads), "--task-cache-bytes", str(cache_bytes))
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, count in (("full", tasks), ("few", 0)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            fill(folder, inventory, count)
            servers[name] = stack.enter_context(serving(backbone, inventory, folder, *flags))
        states = {"ready": _memories(servers)}
        rates = {"untouched": _in_turn(servers, rounds, new_tokens, console)}
        states["worked"] = _memories(servers)
        _touch(servers["full"], [f"many-{number}" for number in range(tasks)])
        _touch(servers["few"], [f"work-{number % WORKING}" for number in range(tasks)])
        states["every task loaded"] = _memories(servers)
        rates["every task loaded"] = _in_turn(servers, rounds, new_tokens, console)
        states["worked again"] = _memories(servers)
    _print_memory(console, states, tasks)
    _print_rates(console, rates, tasks)


def fill(folder: Path, inventory: Path, count: int) -> None:
    """Register `count` random routings with weights for every module, and those of the work."""
    loaded = Inventory.load(inventory)
    layout = loaded.layout
    names = [f"work-{number}" for number in range(WORKING)]
    names += [f"many-{number}" for number in range(count)]
    with contextlib.closing(Registry(folder, loaded.fingerprint, layout)) as registry:
        for seed, name in enumerate(track(names, f"registering {len(names)} tasks")):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(layout.shape("module"), generator=generator)
            registry.create(name, Routing(logits))


def _touch(served: Served, names: Sequence[str]) -> None:
    """A token of mixtures over all these tasks, each of which the server must load for it."""
    for start in track(range(0, len(names), MIXED), f"loading {len(names)} tasks"):
        mixture = dict.fromkeys(names[start : start + MIXED], 1.0)
        served.generate(mixture=mixture, prompt=[100], max_tokens=1)


def _in_turn(
    servers: dict[str, Served], rounds: int, new_tokens: int, console: Console
) -> dict[str, list[Rate]]:
    """Each server's rates, after a run of each that does not count."""
    span = (new_tokens, new_tokens)
    work = make_work(WORKING, WORKING, vocabulary=VOCABULARY, prompt=(8, 8), new_tokens=span)
    found: dict[str, list[Rate]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, served in servers.items():
            rate = _work(served, work)
            console.log(f"round {number}/{rounds} {name}: {rate.cpu:.1f} tokens / CPU s")
            if number:
                found[name].append(rate)
    return found


def _work(served: Served, work: Sequence[Work]) -> Rate:
    def ask(item: Work) -> None:
        name, prompt = f"work-{item.task}", list(item.prompt)
        served.generate(task=name, prompt=prompt, max_tokens=item.new_tokens, ignore_eos=True)

    began, computed = time.perf_counter(), served.cpu_seconds()
    with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
        list(pool.map(ask, work))
    tokens = sum(item.new_tokens for item in work)
    wall, cpu = time.perf_counter() - began, served.cpu_seconds() - computed
    return Rate(tokens / wall, tokens / cpu)


def _memories(servers: dict[str, Served]) -> dict[str, Memory]:
    return {name: served.memory() for name, served in servers.items()}


def _print_memory(console: Console, states: dict[str, dict[str, Memory]], tasks: int) -> None:
    rows = []
    for state, found in states.items():
        for kind in ("resident", "anonymous"):
            full, few = (getattr(found[name], kind) for name in ("full", "few"))
            sizes = [f"{size / 1e6:.0f}" for size in (full, few, full - few)]
            rows.append((f"{state}, {kind}", *sizes))
    title = f"Memory in MB; goal: at most {GOAL_BYTES / 1e6:.0f} MB more"
    columns = ("state", f"{tasks + WORKING} tasks", f"{WORKING} tasks", "more")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)


def _print_rates(console: Console, rates: dict[str, dict[str, list[Rate]]], tasks: int) -> None:
    rows = []
    for state, found in rates.items():
        for clock in ("wall", "cpu"):
            full, few = ([getattr(r, clock) for r in found[name]] for name in ("full", "few"))
            shown = (timing.spread(full), timing.spread(few), timing.ratio(few, full))
            rows.append((f"{state}, by {clock} time", *shown))
    title = f"Tokens per second, {WORKING} requests of {WORKING} tasks; goal: step time over 1.0"
    columns = ("state", f"{tasks + WORKING} tasks", f"{WORKING} tasks", "step time over few")
    timing.print_table(console, title, columns, rows)


if __name__ == "__main__":
    typer.run(main)
