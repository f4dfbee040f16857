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

from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.dialects import FILE_NAME
from polyhead.server.tasks.registry import Registry

ROUNDS = int(os.environ.get("POLYHEAD_CRASH_ROUNDS", "8"))
LAYOUT = Layout(tuple(f"m.{block}.q" for block in range(100)), heads=8, skills=8)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("crash_writer.py")
    command = [sys.executable, str(script), str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        yield process


def killed_round(writer: subprocess.Popen[str], delay: float) -> dict[str, str]:
    """Fingerprints of the tasks that were acknowledged before the kill, by id."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write("\n")
    word, pid = writer.stdout.readline().split()
    assert word == "started"
    time.sleep(delay)
    os.kill(int(pid), signal.SIGKILL)
    acknowledged = {}
    while (line := writer.stdout.readline()) != "dead\n":
        task_id, fingerprint = line.split()
        acknowledged[task_id] = fingerprint
    return acknowledged


def check(folder: Path, acknowledged: dict[str, str]) -> None:
    registry = Registry(folder, "1" * 64, LAYOUT)
    for task_id, fingerprint in acknowledged.items():
        content = registry.content(task_id, registry.get(task_id).generation)
        assert isinstance(content, Routing)
        assert content.fingerprint == fingerprint
    stored = registry.count()
    registry.close()
    assert len(acknowledged) <= stored
    with closing(sqlite3.connect(folder / FILE_NAME)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for table in ("contents", "sketches"):
            assert raw.execute(f"SELECT count(*) FROM {table}").fetchone() == (stored,)


def test_every_acknowledged_task_survives_kill_9(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    acknowledged: dict[str, str] = {}
    moments = random.Random(9)
    for _ in range(ROUNDS):
        acknowledged |= killed_round(writer, delay=moments.uniform(0.0, 0.4))
        check(tmp_path, acknowledged)
    assert len(acknowledged) > ROUNDS
