"""A built suite on disk, read without the training code: its index, its files, an export."""

import json
from pathlib import Path
from typing import Any

from benchmarks.tasks.records import FORMAT, INDEX, digest
from benchmarks.tasks.split import SPLITS

GROUPS = ("all", "pretrain", "held-out")


class SuiteError(Exception):
    """A suite that cannot be read, or a task or split that it has not."""


def read_index(folder: Path) -> list[dict[str, Any]]:
    """What is known about each task. Raises SuiteError where there is no suite of this format."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise SuiteError(f"{path}: missing; build the suite first") from exc
    if content.get("format") != FORMAT:
        raise SuiteError(f"{path}: format {content.get('format')!r}, expected {FORMAT}")
    tasks: list[dict[str, Any]] = content["tasks"]
    return tasks


def read_checked(path: Path, sha256: str) -> bytes:
    """A file's content. Raises SuiteError where it is missing or not what the index says."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        raise SuiteError(f"{path}: missing") from exc
    if digest(content) != sha256:
        raise SuiteError(f"{path}: SHA-256 {digest(content)[:12]}, expected {sha256[:12]}")
    return content


def select(tasks: list[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    """`all`, `pretrain`, `held-out`, or names with commas. Raises SuiteError."""
    if which in GROUPS:
        return [t for t in tasks if which == "all" or t["held_out"] == (which == "held-out")]
    known = {task["name"]: task for task in tasks}
    unknown = [name for name in which.split(",") if name not in known]
    if unknown:
        expected = f"{', '.join(GROUPS)} or names of tasks"
        raise SuiteError(f"tasks: found {', '.join(unknown)}, expected {expected}")
    return [known[name] for name in which.split(",")]


def export(folder: Path, which: str, split: str) -> bytes:
    """One split of several tasks as JSONL, as `polyhead train` reads it. Raises SuiteError."""
    if split not in SPLITS:
        raise SuiteError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    chosen = select(read_index(folder), which)
    files = ((folder / t["name"] / f"{split}.jsonl", t["sha256"][split]) for t in chosen)
    return b"".join(read_checked(path, sha256) for path, sha256 in files)
