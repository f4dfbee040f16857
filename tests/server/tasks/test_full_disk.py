"""A disk without room: 507, nothing half-written, and what is stored is served on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILLER = Path(__file__).with_name("disk_filler.py")
OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


def can_mount(folder: Path) -> bool:
    """Whether a process may have a small disk of its own here."""
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_refuses_changes_and_serves_on(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("a mount namespace cannot be made here, so there is no small disk to fill")
    command = [*OWN_MOUNTS, sys.executable, str(FILLER), str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (adapters, first), (routings, second) = found["private"], found["routing"]
    assert first == second == 507
    assert adapters > 0
    assert found["stored"] == adapters + routings
    assert found["afterwards"] == "late"
