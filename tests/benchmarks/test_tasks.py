"""The suite that packaged data makes: the same bytes everywhere, and nothing leaks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "benchmarks" / "tasks"
HASHES: dict[str, dict[str, Any]] = json.loads((TASKS / "hashes.json").read_text())


def start(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """In a process of its own: this folder's name hides the package from a test."""
    command = [sys.executable, "-m", "benchmarks.tasks", *arguments]
    environment = {**os.environ, **(env or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(*arguments: str) -> tuple[int, str]:
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out + err


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds that differ in what must not matter: hash seed, locale, time zone."""
    folder = tmp_path_factory.mktemp("suites")
    worlds = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "UTC"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"},
    ]
    outs = [folder / str(i) for i in range(2)]
    builds = [start("build", str(out), env=env) for out, env in zip(outs, worlds, strict=True)]
    errors = [build.communicate()[1] for build in builds]
    if builds[0].returncode == 2:
        pytest.skip(f"the suite's data is not installed: {errors[0].splitlines()[-1]}")
    assert errors == ["", ""]
    return outs[0], outs[1]


@pytest.fixture
def copy(suites: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(suites[0], tmp_path / "suite"))


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def test_two_builds_give_the_same_bytes_as_are_committed(suites: tuple[Path, Path]) -> None:
    first, second = map(contents, suites)
    assert first == second
    assert first.keys() == HASHES.keys()


def test_a_sound_suite_is_verified(suites: tuple[Path, Path]) -> None:
    code, said = run("verify", str(suites[1]))
    assert (code, "as committed" in said) == (0, True)


def test_verify_names_what_was_changed_removed_and_added(copy: Path) -> None:
    with (copy / "plural" / "test.jsonl").open("a") as file:
        file.write('{"task": "plural", "input": "thing", "output": "things"}\n')
    (copy / "plural" / "extra.jsonl").touch()
    code, said = run("verify", str(copy))
    assert code == 1
    assert "plural/test.jsonl: found SHA-256" in said
    assert "plural/extra.jsonl: not a file of the suite" in said
    (copy / "roman" / "train.jsonl").unlink()
    assert "roman/train.jsonl: missing" in run("verify", str(copy))[1]


def test_verify_finds_an_input_in_two_splits(copy: Path) -> None:
    stray = json.loads(lines(copy / "plural" / "test.jsonl")[0])
    stray["input"] = f" {stray['input'].upper()}"
    with (copy / "plural" / "train.jsonl").open("a") as file:
        file.write(json.dumps(stray) + "\n")
    word = stray["input"].strip().lower()
    assert f"plural: train and test share 1 inputs: '{word}'" in run("verify", str(copy))[1]


def test_verify_finds_a_held_out_input_in_training(copy: Path) -> None:
    stray = json.loads(lines(copy / "third_person" / "test.jsonl")[0])
    row = {**stray, "task": "past_tense"}
    with (copy / "past_tense" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = run("verify", str(copy))[1]
    assert f"third_person (held out) and past_tense share 1 inputs: {row['input']!r}" in said


def test_verify_finds_a_training_pair_turned_around(copy: Path) -> None:
    stray = json.loads(lines(copy / "american_to_british" / "test.jsonl")[0])
    row = {"task": "misspelling", "input": stray["output"], "output": stray["input"]}
    with (copy / "misspelling" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = run("verify", str(copy))[1]
    assert f"american_to_british/test: {stray['input']!r}" in said
    assert "reverses misspelling/train" in said


def test_the_suite_is_broad_and_its_answers_short(suites: tuple[Path, Path]) -> None:
    tasks = json.loads((suites[0] / "suite.json").read_text())["tasks"]
    assert len(tasks) >= 24
    assert len({task["kind"] for task in tasks if task["held_out"]}) >= 5
    assert sum(task["held_out"] for task in tasks) >= 8
    for task in tasks:
        assert task["counts"]["test"] >= 60
        assert all(source["redistributable"] for source in task["sources"]), task["name"]
        rows = map(json.loads, lines(suites[0] / task["name"] / "test.jsonl"))
        assert max(len(row["output"].split()) for row in rows) <= 5, task["name"]


def test_export_writes_one_file_to_train_on(suites: tuple[Path, Path], tmp_path: Path) -> None:
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    assert run("export", str(suites[0]), str(train))[0] == 0
    assert (
        run("export", str(suites[0]), str(held), "--split", "test", "--tasks", "held-out")[0] == 0
    )
    index = json.loads((suites[0] / "suite.json").read_text())["tasks"]
    for path, split, side in ((train, "train", False), (held, "test", True)):
        rows = [json.loads(line) for line in lines(path)]
        expected = {t["name"]: t["counts"][split] for t in index if t["held_out"] is side}
        found = {name: sum(row["task"] == name for row in rows) for name in expected}
        assert (found, len(rows)) == (expected, sum(expected.values()))
    code, said = run("export", str(suites[0]), str(train), "--tasks", "plural,plurals")
    assert (code, "found plurals" in said) == (2, True)


LOAD = """
import sys
from pathlib import Path
from benchmarks.tasks.built import SuiteError
from benchmarks.tasks.suite import load_suite
suite = load_suite(sys.argv[1])
print(len(suite.pretrain), len(suite.held_out))
print(suite.task("word_sentiment").fewshot[0].choices)
print(suite.task("country_code").train)
Path(sys.argv[1], "plural", "test.jsonl").write_text("")
try:
    load_suite(sys.argv[1])
except SuiteError as exc:
    print(exc)
"""


def test_the_suite_loads_as_examples(copy: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(copy)]
    tasks = json.loads((copy / "suite.json").read_text())["tasks"]
    held = sum(task["held_out"] for task in tasks)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counted, choices, empty, error = done.stdout.splitlines()
    assert counted == f"{len(tasks) - held} {held}"
    assert (choices, empty) == ("('negative', 'positive')", "()")
    assert "plural/test.jsonl: SHA-256 e3b0c44298fc, expected" in error


def test_the_page_shows_the_tasks_as_they_are() -> None:
    code, said = run("list")
    if code == 2:
        pytest.skip("the suite's data is not installed")
    assert said.strip() in (TASKS / "README.md").read_text()


def test_the_requirements_pin_what_the_sources_name() -> None:
    script = "from benchmarks.tasks.sources import SOURCES as all; print(*(s.pin for s in all))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pins = (TASKS / "requirements.txt").read_text().splitlines()
    assert set(done.stdout.split()) <= {pin for pin in pins if not pin.startswith("#")}
