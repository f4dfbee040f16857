"""Changes tasks until it is killed. A new process for each line on stdin.

    python crash_writer.py FOLDER

Writes to stdout: `started PID`, `begin ID STATE` before and `done ID STATE` after every change,
where the state is a content's fingerprint or `-` for none, and `dead` once that process has ended.
"""

import os
import sys
import threading
from itertools import count
from pathlib import Path

import torch

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.contents import Content
from polyhead.server.tasks.registry import Registry

LAYOUT = Layout(tuple(f"m.{block}.q" for block in range(100)), heads=8, skills=8)
WRITERS = 3


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once and in one piece, whenever the end comes


def content(generator: torch.Generator, number: int) -> Content:
    if number % 4 == 3:
        a = torch.randn(64, 4, generator=generator)
        return PrivateAdapter({"m.0.q": a}, {"m.0.q": torch.zeros(4, 8)})
    return Routing.checked(torch.randn(LAYOUT.shape("module"), generator=generator), LAYOUT)


def write(registry: Registry, writer: int) -> None:
    """Registers tasks; every second one is replaced, every third deleted after that."""
    generator = torch.Generator().manual_seed(os.getpid() * WRITERS + writer)
    for number in count():
        task_id = f"{os.getpid()}-{writer}-{number}"
        made = content(generator, number)
        say(f"begin {task_id} {made.fingerprint}")
        registry.create(task_id, made)
        say(f"done {task_id} {made.fingerprint}")
        if number % 2:
            made = content(generator, number + 1)
            say(f"begin {task_id} {made.fingerprint}")
            registry.replace(task_id, made)
            say(f"done {task_id} {made.fingerprint}")
        if number % 3 == 2:
            say(f"begin {task_id} -")
            registry.delete(task_id)
            say(f"done {task_id} -")


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
