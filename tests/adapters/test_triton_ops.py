"""The Triton kernels compile for a GPU; what they compute is tested in `test_triton_step`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In a process of its own: in this one the kernels are interpreted."""
    script = Path(__file__).parents[1] / "kernel_compilation.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run(
        [sys.executable, script],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 6
