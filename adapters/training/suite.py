"""A folder of tasks to evaluate on: `suite.json`, and for each task its examples in JSONL files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.adapters.training.data import Example, read_jsonl
from polyhead.adapters.training.errors import DataError

FILE = "suite.json"


@dataclass(frozen=True)
class SuiteTask:
    """A task with the examples it may be fitted to and those it is tested on."""

    name: str
    description: str
    template: str
    held_out: bool
    fewshot: tuple[Example, ...]
    test: tuple[Example, ...]


def read_suite(folder: Path, names: Sequence[str] = ()) -> list[SuiteTask]:
    """The tasks of these names, all of them where none is given, in the suite's order.

    Raises `DataError` that names the file, and what it lacks.
    """
    path = folder / FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        tasks = [_task(folder, facts) for facts in listed if not names or facts["name"] in names]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if isinstance(exc, DataError):
            raise
        raise DataError(f"not a suite: {type(exc).__name__} {exc}", field=str(path)) from exc
    unknown = sorted(set(names) - {task.name for task in tasks})
    if unknown:
        raise DataError("no such tasks", field=str(path), found=str(unknown))
    return tasks


def _task(folder: Path, facts: Any) -> SuiteTask:
    name: str = facts["name"]
    return SuiteTask(
        name=name,
        description=facts["description"],
        template=facts["template"],
        held_out=bool(facts["held_out"]),
        fewshot=tuple(read_jsonl(folder / name / "fewshot.jsonl")),
        test=tuple(read_jsonl(folder / name / "test.jsonl")),
    )
