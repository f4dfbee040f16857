"""The built suite, read for training and evaluation."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.records import FORMAT, INDEX
from benchmarks.tasks.split import SPLITS
from polyhead.adapters.training.data import Example, read_jsonl

GROUPS = ("all", "pretrain", "held-out")


class SuiteError(Exception):
    """A suite that cannot be read, or a task or split that it has not."""


@dataclass(frozen=True)
class SuiteTask:
    """One task. `train` of a small held-out task may be empty.

    `description` is an instruction to prompt a bare model with; `licences` are those of the
    packaged data that the examples were made from.
    """

    name: str
    kind: str
    description: str
    template: str
    held_out: bool
    choices: tuple[str, ...] | None
    licences: tuple[str, ...]
    train: tuple[Example, ...]
    fewshot: tuple[Example, ...]
    test: tuple[Example, ...]

    def split(self, name: str) -> tuple[Example, ...]:
        """Raises SuiteError for a split that there is not."""
        if name not in SPLITS:
            raise SuiteError(f"split: found {name!r}, expected one of {', '.join(SPLITS)}")
        found: tuple[Example, ...] = getattr(self, name)
        return found


@dataclass(frozen=True)
class Suite:
    """Every task, in the order of the catalogue."""

    tasks: tuple[SuiteTask, ...]

    @property
    def pretrain(self) -> tuple[SuiteTask, ...]:
        return tuple(task for task in self.tasks if not task.held_out)

    @property
    def held_out(self) -> tuple[SuiteTask, ...]:
        return tuple(task for task in self.tasks if task.held_out)

    def select(self, which: str) -> tuple[SuiteTask, ...]:
        """`all`, `pretrain`, `held-out`, or names with commas. Raises SuiteError."""
        if which in GROUPS:
            return {"all": self.tasks, "pretrain": self.pretrain}.get(which, self.held_out)
        known = {task.name: task for task in self.tasks}
        unknown = [name for name in which.split(",") if name not in known]
        if unknown:
            expected = f"{', '.join(GROUPS)} or names of tasks"
            raise SuiteError(f"tasks: found {', '.join(unknown)}, expected {expected}")
        return tuple(known[name] for name in which.split(","))


def load_suite(folder: Path | str) -> Suite:
    """Reads what `build` wrote. Raises SuiteError naming the file that is missing or changed."""
    index = Path(folder) / INDEX
    try:
        content = json.loads(index.read_bytes())
    except FileNotFoundError as exc:
        raise SuiteError(f"{index}: missing; build the suite first") from exc
    if content.get("format") != FORMAT:
        raise SuiteError(f"{index}: format {content.get('format')!r}, expected {FORMAT}")
    return Suite(tuple(load_task(Path(folder), entry) for entry in content["tasks"]))


def load_task(folder: Path, entry: Mapping[str, Any]) -> SuiteTask:
    return SuiteTask(
        name=entry["name"],
        kind=entry["kind"],
        description=entry["description"],
        template=entry["template"],
        held_out=entry["held_out"],
        choices=tuple(entry["choices"]) if entry["choices"] else None,
        licences=tuple(source["licence"] for source in entry["sources"]),
        **{
            split: load_split(folder / entry["name"] / f"{split}.jsonl", entry["sha256"][split])
            for split in SPLITS
        },
    )


def load_split(path: Path, sha256: str) -> tuple[Example, ...]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        raise SuiteError(f"{path}: missing") from exc
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SuiteError(f"{path}: SHA-256 {found[:12]}, expected {sha256[:12]}")
    return tuple(read_jsonl(path)) if content else ()


def export(suite: Suite, which: str, split: str) -> Iterator[str]:
    """JSONL lines of one split of several tasks, as `polyhead train` reads them."""
    for task in suite.select(which):
        for example in task.split(split):
            row = {"task": example.task, "input": example.input, "output": example.output}
            more = {"choices": example.choices} if example.choices else {}
            yield json.dumps({**row, **more}, ensure_ascii=False) + "\n"
