"""`kill -9` at any moment loses nothing that was acknowledged."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from polyhead.adapters.routing import Layout
from polyhead.server.tasks.dialects import FILE_NAME
from polyhead.server.tasks.errors import UnknownTask
from polyhead.server.tasks.registry import Registry

ROUNDS = int(os.environ.get("TEST_CRASH_ROUNDS", "8"))
LAYOUT = Layout(tuple(f"m.{block}.q" for block in range(100)), heads=8, skills=8)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("crash_writer.py")
    command = [sys.executable, str(script), str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        yield process


class Log:
    """What the writers said: what they were told is stored, and what they asked for before."""

    def __init__(self) -> None:
        self.done: dict[str, str] = {}
        self.begun: dict[str, str] = {}
        self.acknowledged = 0

    def take(self, word: str, task_id: str, state: str) -> None:
        if word == "begin":
            self.begun[task_id] = state
        else:
            self.done[task_id] = self.begun.pop(task_id)
            self.acknowledged += 1

    def allows(self, task_id: str, state: str) -> bool:
        """A change that was asked for and not acknowledged may have happened or not."""
        return state in (self.done.get(task_id, "-"), self.begun.get(task_id))


def killed_round(writer: subprocess.Popen[str], delay: float, log: Log) -> None:
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write("\n")
    word, pid = writer.stdout.readline().split()
    assert word == "started"
    time.sleep(delay)
    os.kill(int(pid), signal.SIGKILL)
    while (line := writer.stdout.readline()) != "dead\n":
        log.take(*line.split())


def state_of(registry: Registry, task_id: str) -> str:
    """The fingerprint of what is stored, read and hashed again; `-` for no task."""
    try:
        return registry.load(task_id)[1].fingerprint
    except UnknownTask:
        return "-"


def check(folder: Path, log: Log, task_ids: set[str]) -> None:
    """That the database opens and is whole, and that these tasks are what they may be."""
    registry = Registry(folder, "1" * 64, LAYOUT)
    for task_id in task_ids:
        assert log.allows(task_id, state_of(registry, task_id)), task_id
    registry.close()
    with closing(sqlite3.connect(folder / FILE_NAME)) as raw:
        for statement in ("PRAGMA integrity_check", "PRAGMA foreign_key_check"):
            assert raw.execute(statement).fetchall() in ([("ok",)], [])
        held = "SELECT content FROM tasks UNION SELECT content FROM versions"
        orphans = f"SELECT count(*) FROM contents WHERE fingerprint NOT IN ({held})"
        assert raw.execute(orphans).fetchone() == (0,)
        unlogged = "SELECT count(*) FROM tasks WHERE id NOT IN (SELECT task FROM audit)"
        assert raw.execute(unlogged).fetchone() == (0,)


def test_every_acknowledged_change_survives_kill_9(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    log = Log()
    moments = random.Random(9)
    for number in range(ROUNDS):
        before = log.done.keys() | log.begun.keys()
        killed_round(writer, moments.uniform(0.0, 0.4), log)
        known = log.done.keys() | log.begun.keys()
        last = number == ROUNDS - 1
        check(tmp_path, log, set(known if last else known - before))
    print(f"{ROUNDS} rounds, {log.acknowledged} acknowledged changes, none lost")
    assert log.acknowledged > ROUNDS
    assert "-" in log.done.values()


def test_the_log_would_notice_a_lost_change() -> None:
    log = Log()
    log.take("begin", "t", "1")
    assert log.allows("t", "-")
    log.take("done", "t", "1")
    assert not log.allows("t", "-")
    log.take("begin", "t", "2")
    assert log.allows("t", "1")
    assert log.allows("t", "2")
    assert not log.allows("t", "3")
