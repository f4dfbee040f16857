"""The demo inventory: skills that were trained on real tasks, and the tasks' routings.

It lies in `trained/` beside this file, where its card tells what it learned from and how well.
"""

import hashlib
import shutil
from pathlib import Path

from polyhead.server.demo.folders import is_made_from, replaced

NAME = "inventory"
TRAINED = Path(__file__).parent / "trained"


def prepare_inventory(folder: Path) -> Path:
    """Make `folder/inventory` as the server reads it, unless it is there already.

    Returns its path; takes less than a second.
    """
    target = folder / NAME
    recipe: dict[str, str | int] = {"inventory": "trained", "sha256": _digest(TRAINED)}
    if not is_made_from(target, recipe):
        with replaced(target, recipe) as fresh:
            shutil.copytree(TRAINED, fresh, dirs_exist_ok=True)
    return target


def _digest(folder: Path) -> str:
    """SHA-256 of every file's name and bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
