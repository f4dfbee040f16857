"""What must hold between the tasks and splits of a built suite, whatever made it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.records import INDEX, differences
from benchmarks.tasks.spec import normal
from benchmarks.tasks.split import LEAST_TEST, SPLITS

FEWEST_TASKS, FEWEST_HELD_OUT = 24, 8
MOST_SHOWN = 3
"""Overlapping inputs named in a message."""


@dataclass(frozen=True)
class Built:
    """One task as it lies on disk: split → (input, output) rows."""

    name: str
    held_out: bool
    choices: tuple[str, ...] | None
    rows: Mapping[str, tuple[tuple[str, str], ...]]

    def inputs(self, *splits: str) -> set[str]:
        return {normal(given) for split in splits or SPLITS for given, _ in self.rows[split]}


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with the suite in `folder`; empty when it is as committed."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    wrong = differences(files)
    if any(text.endswith(": missing") for text in wrong):
        return wrong
    return wrong + problems(read(files))


def read(files: Mapping[str, bytes]) -> list[Built]:
    return [built(entry, files) for entry in json.loads(files[INDEX])["tasks"]]


def built(entry: Mapping[str, Any], files: Mapping[str, bytes]) -> Built:
    rows = {
        split: tuple(
            (row["input"], row["output"])
            for row in map(json.loads, files[f"{entry['name']}/{split}.jsonl"].splitlines())
        )
        for split in SPLITS
    }
    choices = tuple(entry["choices"]) if entry["choices"] else None
    return Built(entry["name"], entry["held_out"], choices, rows)


def problems(tasks: Sequence[Built]) -> list[str]:
    return [
        *sizes(tasks),
        *(text for task in tasks for text in within(task)),
        *between(tasks),
        *reversals(tasks),
    ]


def sizes(tasks: Sequence[Built]) -> Iterator[str]:
    held = sum(task.held_out for task in tasks)
    if len(tasks) < FEWEST_TASKS or held < FEWEST_HELD_OUT:
        yield (
            f"{len(tasks)} tasks with {held} held out, "
            f"expected at least {FEWEST_TASKS} with {FEWEST_HELD_OUT}"
        )
    for task in tasks:
        if len(task.rows["test"]) < LEAST_TEST:
            yield f"{task.name}: {len(task.rows['test'])} test rows, expected {LEAST_TEST}"


def within(task: Built) -> Iterator[str]:
    for split in SPLITS:
        rows = task.rows[split]
        if len(task.inputs(split)) != len(rows):
            yield f"{task.name}/{split}: an input occurs twice"
        if task.choices and {answer for _, answer in rows} - set(task.choices):
            yield f"{task.name}/{split}: an answer is not among the choices"
        if any(not given.strip() or not answer.strip() for given, answer in rows):
            yield f"{task.name}/{split}: an empty input or output"
    for first, second in (("train", "fewshot"), ("train", "test"), ("fewshot", "test")):
        shared = task.inputs(first) & task.inputs(second)
        if shared:
            yield f"{task.name}: {first} and {second} share {shown(shared)}"


def between(tasks: Sequence[Built]) -> Iterator[str]:
    """No input of a held-out task is an input of a training task, in whatever split."""
    for held in (task for task in tasks if task.held_out):
        for task in (task for task in tasks if not task.held_out):
            shared = held.inputs() & task.inputs()
            if shared:
                yield f"{held.name} (held out) and {task.name} share {shown(shared)}"


def reversals(tasks: Sequence[Built]) -> Iterator[str]:
    """No test row is a row that some training task trains on, turned around."""
    trained = {
        (normal(answer), normal(given)): task.name
        for task in tasks
        if not task.held_out
        for given, answer in task.rows["train"]
    }
    for task in tasks:
        pairs = {(normal(given), normal(answer)) for given, answer in task.rows["test"]}
        for pair in sorted(pairs & trained.keys()):
            yield f"{task.name}/test: {pair[0]!r} → {pair[1]!r} reverses {trained[pair]}/train"


def shown(inputs: set[str]) -> str:
    first = ", ".join(map(repr, sorted(inputs)[:MOST_SHOWN]))
    return f"{len(inputs)} inputs: {first}{', …' if len(inputs) > MOST_SHOWN else ''}"
