"""Every measurement can be called, and the list of them is whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "def main(" in path.read_text() and path.stem != "__main__"
)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_there_are_measurements() -> None:
    assert {"throughput", "registration", "memory", "liveness"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    found = run(name, "--help")
    assert found.returncode == 0, found.stderr
    assert "--backbone" in found.stdout


def test_without_a_name_exactly_the_commands_are_listed() -> None:
    found = run()
    assert found.returncode == 0, found.stderr
    assert sorted(re.findall(r"^  (\w+) ", found.stdout, re.MULTILINE)) == sorted(
        [*COMMANDS, "all"]
    )


def test_an_unknown_name_is_refused_and_runs_nothing() -> None:
    found = run("thruput")
    assert (found.returncode, found.stdout) == (2, "")
    assert "'thruput'" in found.stderr


def test_every_command_has_its_section_of_results() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert [name for name in COMMANDS if f"`python -m benchmarks {name}" not in text] == []
