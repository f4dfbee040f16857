"""The gate: shares of time while the server is busy, all of it while it is not."""

import os
import subprocess
import sys
import threading
import time

import pytest

from polyhead.server.fitting.gate import Gate

PIECE = 0.02


def pieces(gate: Gate, seconds: float) -> float:
    """The share of the time that went into computing."""
    began = time.monotonic()
    count = 0
    while time.monotonic() - began < seconds:
        gate.pass_through()
        time.sleep(PIECE)  # stands for a forward and backward pass
        count += 1
    return count * PIECE / (time.monotonic() - began)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_busy_server_gets_the_rest(share: float) -> None:
    gate = Gate(share, 2, lambda _: None)
    gate.set_busy(True)
    assert pieces(gate, 1.0) <= share * 1.15 + PIECE
    gate.set_busy(False)
    assert pieces(gate, 0.3) > 0.75


def test_the_pause_ends_when_the_server_falls_idle() -> None:
    gate = Gate(0.001, 2, lambda _: None)
    gate.set_busy(True)
    time.sleep(0.1)
    threading.Timer(0.2, gate.set_busy, (False,)).start()
    began = time.monotonic()
    gate.pass_through()  # 100 s at this share
    assert 0.15 < time.monotonic() - began < 10


def test_a_hurry_ends_one_pause_only() -> None:
    gate = Gate(0.05, 2, lambda _: None)
    gate.set_busy(True)
    time.sleep(0.05)
    threading.Timer(0.1, gate.hurry).start()
    began = time.monotonic()
    gate.pass_through()
    assert time.monotonic() - began < 0.6
    time.sleep(0.02)
    began = time.monotonic()
    gate.pass_through()
    assert time.monotonic() - began > 0.3


def test_what_was_before_the_fit_is_not_paused_for() -> None:
    gate = Gate(0.01, 2, lambda _: None)
    gate.set_busy(True)
    time.sleep(0.1)
    gate.begin()
    began = time.monotonic()
    gate.pass_through()
    assert time.monotonic() - began < 5  # 10 s for the sleep


def test_one_thread_while_busy_and_all_when_idle() -> None:
    told: list[int] = []
    gate = Gate(0.5, 7, told.append)
    gate.pass_through()
    gate.pass_through()
    gate.set_busy(True)
    gate.pass_through()
    gate.set_busy(False)
    gate.pass_through()
    assert told == [7, 1, 7]


def test_the_process_is_last_in_line_for_cores_and_memory() -> None:
    ours = os.nice(0)
    code = (
        "import os; from polyhead.server.fitting.gate import yield_everything as y; y();"
        "print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE,"
        "open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", "True", "1000"]
    assert os.nice(0) == ours < 19
