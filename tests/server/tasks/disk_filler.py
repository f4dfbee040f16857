"""Fills a small disk of its own with tasks; run in a mount namespace of its own.

    python disk_filler.py FOLDER

Writes to stdout what it found, as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from polyhead.adapters.plan import PreparedAdapter
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.http.problems import problem_of
from polyhead.server.tasks.catalogue import Catalogue
from polyhead.server.tasks.errors import StorageFull
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots

LAYOUT = Layout(tuple(f"m.{block}.q" for block in range(100)), heads=8, skills=8)


def fill(registry: Registry, prefix: str, content: Routing | PrivateAdapter) -> tuple[int, int]:
    """How many tasks fit, and the status of the refusal of the next."""
    for number in range(1000):
        try:
            if isinstance(content, Routing):
                registry.create(f"{prefix}{number}", Routing(content.values + number))
            else:
                a = {name: tensor + number for name, tensor in content.a.items()}
                registry.create(f"{prefix}{number}", PrivateAdapter(a, content.b))
        except StorageFull as exc:
            return number, problem_of(exc).status
    raise AssertionError("the disk is too large")


def main(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    registry = Registry(folder / "data", "1" * 64, LAYOUT)
    slots = Slots(lambda adapter: PreparedAdapter(adapter.fingerprint, []))
    catalogue = Catalogue(registry, LAYOUT, slots)
    adapter = PrivateAdapter({"m.0.q": torch.randn(2048, 64)}, {"m.0.q": torch.randn(64, 8)})
    found: dict[str, Any] = {"private": fill(registry, "p", adapter)}
    found["routing"] = fill(registry, "r", Routing(torch.randn(LAYOUT.shape("module"))))
    stored = registry.list(limit=1000)[0]
    for task in stored:
        assert catalogue.resolve(task.id).task == task
    found["stored"] = len(stored)
    ballast.unlink()
    found["afterwards"] = registry.create("late", Routing(torch.zeros(LAYOUT.shape("module")))).id
    registry.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
