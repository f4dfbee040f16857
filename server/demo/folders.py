"""Writing a folder so that it is either there and whole, or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MARKER = "polyhead-demo.json"
"""Lies in every finished folder and says what it was made from."""


class DemoError(Exception):
    """The demo could not be prepared; the message says what to do."""


def is_made_from(folder: Path, recipe: Mapping[str, str | int]) -> bool:
    """Whether `folder` is finished and was made from exactly this recipe."""
    try:
        return bool(json.loads((folder / MARKER).read_bytes()) == dict(recipe))
    except (OSError, ValueError):
        return False


@contextmanager
def replaced(folder: Path, recipe: Mapping[str, str | int]) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        yield fresh
        (fresh / MARKER).write_text(json.dumps(dict(recipe), indent=2) + "\n")
        for path in fresh.rglob("*"):
            # safetensors writes 0600; whoever runs the server may be someone else.
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.move(folder, Path(scratch, "old"))
        os.rename(fresh, folder)
