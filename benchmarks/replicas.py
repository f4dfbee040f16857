"""Tokens a second of two replicas on Ray Serve over those of one, each with a core and a thread.

    python -m benchmarks replicas --database-url postgresql://…

Both sides are up all the while and answer in turn, so that a slow spell of the machine meets
both. A core that others use too makes the clock say less than the replicas could do; tokens per CPU
second of a replica, times the replicas, is what they would do with their cores to themselves.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.serving import Served, free_port
from benchmarks.workload import VOCABULARY, make_work

START = [sys.executable, "-c", "from polyhead.server.cli import app; app()", "scale"]
REPLICA = b"ray::ServeReplica:polyhead:replica"
TASKS = 16
WARM_UP = 10.0
READY_SECONDS = 300.0
TOKENS = "polyhead_generation_tokens_total{"


@dataclass(frozen=True)
class Side:
    """So many replicas behind one port."""

    port: int
    replicas: Sequence[Served]


@dataclass(frozen=True)
class Window:
    """What a side did while it was watched."""

    seconds: float
    tokens: float
    cpu: Sequence[float]  # seconds of each replica

    @property
    def by_clock(self) -> float:
        return self.tokens / self.seconds

    @property
    def by_cpu(self) -> float:
        """Tokens a second, had every replica a core of its own."""
        return self.tokens / sum(self.cpu) * len(self.cpu)


def main(
    database_url: Annotated[str, typer.Option(help="PostgreSQL that the replicas share")],
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    rounds: Annotated[int, typer.Option(help="How often each side is watched")] = 3,
    seconds: Annotated[float, typer.Option(help="For how long each time")] = 40.0,
    at_once: Annotated[int, typer.Option(help="Requests at each replica at a time")] = 16,
) -> None:
    console = Console(width=120)
    with contextlib.ExitStack() as stack:
        sides = {
            count: stack.enter_context(scaled(count, database_url, backbone, inventory))
            for count in (1, 2)
        }
        runs: dict[int, list[Window]] = {count: [] for count in sides}
        for number, (count, side) in ((n, s) for n in range(rounds) for s in sides.items()):
            window = watched(side, count * at_once, seconds)
            runs[count].append(window)
            console.log(f"round {number + 1}/{rounds}, {count} replicas: {window}")
    _tell(console, runs)


@contextlib.contextmanager
def scaled(count: int, database_url: str, backbone: Path, inventory: Path) -> Iterator[Side]:
    """A cluster of its own with so many replicas, each on one core."""
    port = free_port()
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        flags = {
            "backbone": backbone.absolute(),
            "inventory": inventory.absolute(),
            "data-dir": f"{home}/data",
            "database-url": database_url,
            "port": port,
            "min-replicas": count,
            "max-replicas": count,
            "cpus": 0.9,
            "threads": 1,
            "log-level": "warning",
            "prefix-cache-tokens": 0,
        }
        environment = {
            **os.environ,
            "RAY_TMPDIR": home,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [*START, *(f"--{name}={value}" for name, value in flags.items())]
        with (
            Path(home, "log").open("w") as log,
            subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            ) as process,
        ):
            try:
                yield _ready(count, port, process, home)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _ready(count: int, port: int, process: "subprocess.Popen[bytes]", home: str) -> Side:
    end = time.monotonic() + READY_SECONDS
    gateway = Served(port, process.pid)
    while True:
        with contextlib.suppress(OSError):
            replicas = _replicas(port, home)
            if gateway.call("GET", "/health/ready")[0] == 200 and len(replicas) == count:
                break
        if process.poll() is not None or time.monotonic() > end:
            sys.exit(f"{count} replicas did not start:\n{Path(home, 'log').read_text()[-3000:]}")
        time.sleep(0.5)
    for core, replica in zip(cycle(sorted(os.sched_getaffinity(0))), replicas, strict=False):
        for thread in Path(f"/proc/{replica.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
    return Side(port, replicas)


def _replicas(port: int, home: str) -> list[Served]:
    """The replicas' processes, by their names and the folder of their cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            if name.startswith(REPLICA) and home.encode() in (folder / "environ").read_bytes():
                found.append(Served(port, int(folder.name)))
    return found


def watched(side: Side, at_once: int, seconds: float) -> Window:
    """What a side does in `seconds` with so many requests at a time."""
    lock, over = threading.Lock(), threading.Event()
    gateway = Served(side.port, 0)
    tasks = [task["id"] for task in gateway.get(f"/tasks?limit={TASKS}")["tasks"]]
    work = cycle(make_work(256, len(tasks), vocabulary=VOCABULARY))

    def ask() -> None:
        while not over.is_set():
            with lock:
                request = next(work)
            gateway.generate(
                task=tasks[request.task],
                prompt=list(request.prompt),
                max_tokens=request.new_tokens,
                ignore_eos=True,
            )

    clients = [threading.Thread(target=ask) for _ in range(at_once)]
    for client in clients:
        client.start()
    time.sleep(WARM_UP)
    before, began = _state(side), time.monotonic()
    time.sleep(seconds)
    after, length = _state(side), time.monotonic() - began
    over.set()
    for client in clients:
        client.join()
    cpu = [last - first for first, last in zip(before[1], after[1], strict=True)]
    return Window(length, after[0] - before[0], cpu)


def _state(side: Side) -> tuple[float, list[float]]:
    """Tokens generated by all replicas so far, and CPU seconds of each."""
    lines = Served(side.port, 0).call("GET", "/metrics")[1].decode().splitlines()
    tokens = sum(float(line.split()[-1]) for line in lines if line.startswith(TOKENS))
    return tokens, [replica.cpu_seconds() for replica in side.replicas]


def _tell(console: Console, runs: Mapping[int, Sequence[Window]]) -> None:
    clock = {count: [run.by_clock for run in found] for count, found in runs.items()}
    cpu = {count: [run.by_cpu for run in found] for count, found in runs.items()}
    rows = [
        (
            f"{count} replicas",
            timing.spread(clock[count]),
            timing.ratio(clock[count], clock[1]),
            timing.spread(cpu[count]),
            timing.ratio(cpu[count], cpu[1]),
            timing.spread([sum(run.cpu) / run.seconds for run in runs[count]]),
        )
        for count in runs
    ]
    columns = ("side", "tokens/s", "over one", "with own cores", "over one", "cores used")
    timing.print_table(console, timing.machine(), columns, rows)


if __name__ == "__main__":
    typer.run(main)
