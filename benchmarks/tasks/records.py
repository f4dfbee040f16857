"""How the suite lies on disk, and how its files are compared with the committed hashes.

`OUT/<task>/<split>.jsonl` holds the examples, `OUT/suite.json` what is known about the tasks.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tasks.sources import Source
from benchmarks.tasks.spec import Pair, TaskSpec
from benchmarks.tasks.split import SPLITS, Splits

HASHES = Path(__file__).with_name("hashes.json")
INDEX = "suite.json"
FORMAT = 1


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def as_lines(spec: TaskSpec, pairs: tuple[Pair, ...]) -> bytes:
    more = {"choices": list(spec.choices)} if spec.choices else {}
    rows = ({"task": spec.name, "input": p.input, "output": p.output, **more} for p in pairs)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def describe_source(source: Source) -> dict[str, Any]:
    return {
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
        "redistributable": source.redistributable,
        "note": source.note,
    }


def describe(spec: TaskSpec, splits: Splits, files: Mapping[str, bytes]) -> dict[str, Any]:
    """A task's entry in the index."""
    return {
        "name": spec.name,
        "kind": spec.kind,
        "description": spec.description,
        "template": spec.template,
        "held_out": spec.held_out,
        "choices": list(spec.choices) if spec.choices else None,
        "sources": [describe_source(source) for source in spec.sources],
        "counts": {split: len(getattr(splits, split)) for split in SPLITS},
        "sha256": {split: digest(files[f"{spec.name}/{split}.jsonl"]) for split in SPLITS},
    }


def render(specs: tuple[TaskSpec, ...], suite: Mapping[str, Splits]) -> dict[str, bytes]:
    """Every file of the suite: path below OUT → content."""
    files = {
        f"{spec.name}/{split}.jsonl": as_lines(spec, getattr(suite[spec.name], split))
        for spec in specs
        for split in SPLITS
    }
    tasks = [describe(spec, suite[spec.name], files) for spec in specs]
    return {INDEX: as_json({"format": FORMAT, "tasks": tasks}), **files}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replaces the suite in `folder`; what else lies there stays, for `verify` to name."""
    if (folder / INDEX).exists():
        for task in json.loads((folder / INDEX).read_bytes())["tasks"]:
            shutil.rmtree(folder / task["name"], ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def expected() -> dict[str, dict[str, Any]]:
    """The committed hashes: path below OUT → `sha256` and `lines`."""
    known: dict[str, dict[str, Any]] = json.loads(HASHES.read_text(encoding="utf-8"))
    return known


def fingerprint(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": digest(content), "lines": content.count(b"\n")}
        for name, content in sorted(files.items())
    }


def differences(files: Mapping[str, bytes]) -> list[str]:
    """What differs from the committed hashes, one sentence for each file."""
    found, known = fingerprint(files), expected()
    names = sorted(found.keys() | known.keys())
    return [text for name in names if (text := difference(name, found.get(name), known.get(name)))]


def difference(
    name: str, found: Mapping[str, Any] | None, known: Mapping[str, Any] | None
) -> str | None:
    if found is None:
        return f"{name}: missing"
    if known is None:
        return f"{name}: not a file of the suite"
    if found == known:
        return None
    return (
        f"{name}: found SHA-256 {found['sha256'][:12]} ({found['lines']} lines), "
        f"expected {known['sha256'][:12]} ({known['lines']} lines)"
    )


def accept(files: Mapping[str, bytes]) -> None:
    """Makes what was built the committed truth; the change is then for a reviewer to see."""
    HASHES.write_bytes(as_json(fingerprint(files)))
