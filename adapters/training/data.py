"""Examples to learn from: JSONL files and `datasets` folders, checked before anything is trained.

One record is an object with `task`, `output` and `input`, or `task` and `messages` (roles
`system`, `user`, `assistant`, the last one the assistant's answer), and optionally `choices`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.adapters.inventory import RESERVED_TASK, TASK_NAME
from polyhead.adapters.training.errors import DataError

ROLES = ("system", "user", "assistant")
FIELDS = frozenset({"task", "input", "output", "messages", "choices"})


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What a task is asked and what it should answer.

    `messages`, where given, is the conversation before the answer; it is rendered by the
    backbone's chat template and `input` (the last user turn) is then only for reading.
    """

    task: str
    input: str
    output: str
    choices: tuple[str, ...] | None = None
    messages: tuple[Message, ...] | None = None


def parse_example(record: Any, where: str) -> Example:
    """One record. Raises `DataError` that starts with `where` and names the field."""
    if not isinstance(record, Mapping):
        raise DataError("not an object", field=where, found=type(record).__name__)
    # Columns that other records of a table have stand as None in a `datasets` row.
    given = {key: value for key, value in record.items() if value is not None}
    odd = sorted(given.keys() - FIELDS)
    if odd:
        raise DataError(
            "unknown fields", field=where, found=str(odd), expected=f"among {sorted(FIELDS)}"
        )
    task = _text(given, "task", where)
    if not TASK_NAME.fullmatch(task) or task == RESERVED_TASK:
        raise DataError(
            "unusable task name",
            field=f"{where}.task",
            found=repr(task),
            expected=f"a match of {TASK_NAME.pattern}, not {RESERVED_TASK!r}",
        )
    choices = _choices(given, where)
    if "messages" in given:
        return _conversation(given, task, choices, where)
    return Example(task, _text(given, "input", where), _text(given, "output", where), choices)


def read_jsonl(path: Path | str, task: str | None = None) -> list[Example]:
    """Examples of a JSONL file, one object a line; blank lines are passed over.

    task: whose examples those are that do not name their task.
    Raises `DataError` that names the file, the line (from 1) and the field.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"cannot be read: {exc}", field=str(path)) from exc
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"not JSON: {exc.msg} at column {exc.colno}", field=where) from exc
        if task is not None and isinstance(record, dict):
            record.setdefault("task", task)
        examples.append(parse_example(record, where))
    if not examples:
        raise DataError("no examples", field=str(path))
    return examples


def read_dataset(folder: Path | str) -> list[Example]:
    """Examples of a folder that `datasets.Dataset.save_to_disk` wrote, with the same columns.

    Raises `DataError` that names the folder, the row (from 0) and the field.
    """
    try:
        from datasets import load_from_disk
    except ImportError as exc:
        raise DataError("reading it needs the package 'datasets'", field=str(folder)) from exc
    try:
        rows: Iterable[Any] = load_from_disk(str(folder))
    except (OSError, ValueError) as exc:
        raise DataError(f"not a dataset on disk: {exc}", field=str(folder)) from exc
    if isinstance(rows, Mapping):
        raise DataError(
            "several splits", field=str(folder), found=str(sorted(rows)), expected="one split"
        )
    examples = [parse_example(row, f"{folder}[{i}]") for i, row in enumerate(rows)]
    if not examples:
        raise DataError("no examples", field=str(folder))
    return examples


def read_examples(path: Path | str, task: str | None = None) -> list[Example]:
    """A JSONL file, whose lines may leave out `task` where it is given here, or a folder that
    `datasets` saved. Raises `DataError`."""
    return read_dataset(path) if Path(path).is_dir() else read_jsonl(path, task)


def digest(path: Path | str) -> str:
    """SHA-256 of a file, or of every file of a folder in the order of their names."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        if path.is_dir():
            sha.update(f"{file.relative_to(path)}\0".encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()


def by_task(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples by task, tasks in the order of their names."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    return dict(sorted(found.items()))


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        found = type(value).__name__ if not isinstance(value, str) else "an empty text"
        raise DataError(
            "wrong value",
            field=f"{where}.{field}",
            found="nothing" if value is None else found,
            expected="a text that is not empty",
        )
    return value


def _choices(record: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    choices = record.get("choices")
    if choices is None:
        return None
    sound = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not sound or len(choices) < 2 or len(set(choices)) != len(choices):
        raise DataError(
            "wrong value",
            field=f"{where}.choices",
            found=repr(choices)[:80],
            expected="at least two different texts",
        )
    return tuple(choices)


def _conversation(
    record: Mapping[str, Any], task: str, choices: tuple[str, ...] | None, where: str
) -> Example:
    clash = sorted({"input", "output"} & record.keys())
    if clash:
        raise DataError(
            "given beside messages", field=f"{where}.{clash[0]}", expected="one or the other"
        )
    turns = tuple(_turns(record["messages"], f"{where}.messages"))
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError(
            "nothing to learn",
            field=f"{where}.messages",
            found=str([turn.role for turn in turns]),
            expected="at least two turns, the last one the assistant's",
        )
    asked = [turn.content for turn in turns[:-1] if turn.role == "user"]
    return Example(
        task, asked[-1] if asked else turns[-2].content, turns[-1].content, choices, turns[:-1]
    )


def _turns(messages: Any, where: str) -> Iterator[Message]:
    if not isinstance(messages, list):
        raise DataError(
            "wrong value", field=where, found=type(messages).__name__, expected="a list"
        )
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise DataError(
                "wrong turn",
                field=f"{where}[{i}]",
                found=repr(turn)[:80],
                expected=f"an object with 'role', one of {list(ROLES)}, and 'content'",
            )
        yield Message(turn["role"], _text(turn, "content", f"{where}[{i}]"))
