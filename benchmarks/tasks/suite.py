"""The built suite, read for training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.built import SuiteError, read_checked, read_index
from benchmarks.tasks.split import SPLITS
from polyhead.adapters.training.data import Example, read_jsonl


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

    def task(self, name: str) -> SuiteTask:
        """Raises SuiteError for a name that no task has."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise SuiteError(f"task: found {name!r}, expected one of the suite's")


def load_suite(folder: Path | str) -> Suite:
    """Reads what `build` wrote. Raises SuiteError naming the file that is missing or changed."""
    return Suite(tuple(load_task(Path(folder), entry) for entry in read_index(Path(folder))))


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
    """`read_jsonl` takes no empty file, and a small held-out task has nothing to train on."""
    return tuple(read_jsonl(path)) if read_checked(path, sha256) else ()
