"""The requests that the sides of a comparison share."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from dataclasses import asdict
from benchmarks.workload import make_work
print(json.dumps([asdict(item) for item in make_work(**json.loads(sys.argv[1]))]))
"""


def work(**changes: Any) -> Any:
    """`make_work` in a process of its own: this folder's name hides the package from a test."""
    arguments = json.dumps({"count": 200, "tasks": 5, "vocabulary": 1000, **changes})
    command = [sys.executable, "-c", SCRIPT, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_same_arguments_give_the_same_work_in_every_process() -> None:
    assert work() == work()
    assert work() != work(seed=1)


def test_the_number_of_tasks_changes_nothing_but_the_tasks() -> None:
    one, all_of_them = work(tasks=1), work(tasks=200)
    assert [w["task"] for w in one] == [0] * 200
    assert [w["task"] for w in all_of_them] == list(range(200))
    for few, many in zip(one, all_of_them, strict=True):
        assert {**few, "task": None} == {**many, "task": None}


def test_lengths_and_tokens_stay_within_what_was_asked() -> None:
    found = work(vocabulary=50, prompt=(2, 4), new_tokens=(5, 6))
    assert {len(w["prompt"]) for w in found} == {2, 3, 4}
    assert {w["new_tokens"] for w in found} == {5, 6}
    assert {token for w in found for token in w["prompt"]} <= set(range(10, 50))
