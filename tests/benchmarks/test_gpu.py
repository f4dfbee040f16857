"""The measurement for GPUs runs whole on a CPU, in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

ROOT = Path(__file__).parents[2]


def test_it_checks_the_kernels_and_times_every_side(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--backbone", "tiny", "--out", str(tmp_path)]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    sides = {(f["part"], f["form"], f["tasks"], f["resident"]) for f in report["figures"]}
    assert {(part, "factored", 2, 50) for part in ("linears", "step")} <= sides
    assert {("step", "factored, forked", 2, 2), ("step", "combined, forked", 2, 2)} <= sides
    assert all(0 < f["least"] <= f["median"] <= f["most"] for f in report["figures"])
    assert (tmp_path / "gpu.md").read_text().startswith("## GPU")
