"""What the soak says of a server that grows, keeps something, or answers wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from collections import Counter
from types import SimpleNamespace
from benchmarks import soak

def judged(growth=0, files=0, busy=0.0, wrong=()):
    samples = [soak.Sample(float(s), 10**9 + s * growth) for s in range(0, 600, 2)]
    churn = SimpleNamespace(done=Counter(answer=3), wrong=list(wrong))
    first, last = soak.Rest(10, 20, 0, 0.0), soak.Rest(10, 20 + files, 0, busy)
    return soak.report(first, last, samples, churn, 1.0)

print(json.dumps([judged(**case) for case in json.loads(sys.argv[1])]))
"""
CASES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"growth": 16_000}, ""),  # 0.96 % in 600 s
    ({"growth": 17_000}, "memory grows by 1.01 %"),
    ({"files": 2}, "2 files are left over"),
    ({"busy": 1.0}, "1 seats, places in line or slots are still taken"),
    ({"wrong": ["score: 500"]}, "wrong answer: score: 500"),
]


def test_what_changes_fails_and_what_stays_passes() -> None:
    # In a process of its own, for this folder's name hides the package from a test.
    cases = json.dumps([case for case, _ in CASES])
    command = [sys.executable, "-c", SCRIPT, cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for (case, said), wrong in zip(CASES, found, strict=True):
        assert len(wrong) == bool(said), case
        assert said in "".join(wrong), case


@pytest.mark.skipif("TEST_SOAK_MINUTES" not in os.environ, reason="TEST_SOAK_MINUTES is not set")
def test_a_short_soak_of_the_tiny_backbone(model_folder: Path) -> None:
    minutes = float(os.environ["TEST_SOAK_MINUTES"])
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", str(minutes)]
    folders = ["--backbone", model_folder / "backbone", "--inventory", model_folder / "inventory"]
    # Minutes say little of memory; threads, files and seats show at once.
    numbers = ["--warm-up", str(minutes / 3), "--fit-every", "10", "--limit", "100", "--rate", "10"]
    done = subprocess.run(
        [*command, *map(str, folders), *numbers], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
