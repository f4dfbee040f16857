"""Registers tasks until it is killed. A new process for each line on stdin.

    python crash_writer.py FOLDER

Writes to stdout: `started PID`, then `ID FINGERPRINT` for every task that was acknowledged, and
`dead` once that process has ended.
"""

import os
import sys
import threading
from itertools import count
from pathlib import Path

import torch

from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.registry import Registry

LAYOUT = Layout(tuple(f"m.{block}.q" for block in range(100)), heads=8, skills=8)
WRITERS = 3


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once and in one piece, whenever the end comes


def write(registry: Registry, writer: int) -> None:
    generator = torch.Generator().manual_seed(os.getpid() * WRITERS + writer)
    for number in count():
        logits = torch.randn(LAYOUT.shape("module"), generator=generator)
        routing = Routing.checked(logits, LAYOUT)
        task = registry.create(f"{os.getpid()}-{writer}-{number}", routing)
        say(f"{task.id} {routing.fingerprint}")


def write_until_killed(folder: Path) -> None:
    say(f"started {os.getpid()}")
    registry = Registry(folder, "1" * 64, LAYOUT)
    for writer in range(1, WRITERS):
        threading.Thread(target=write, args=(registry, writer), daemon=True).start()
    write(registry, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            write_until_killed(Path(sys.argv[1]))
        os.waitpid(child, 0)
        say("dead")
