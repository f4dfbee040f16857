"""Memory really goes back."""

import ctypes
import subprocess
import sys

import pytest

MEASURE = """
import torch
from pathlib import Path
from polyhead.server.heap import TRIM_AFTER_BYTES, Trimming

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))

before = resident()
blocks = [torch.zeros(12_500) for _ in range(2000)]  # 50 kB each
whole = resident() - before
kept = blocks[::2]
del blocks
trimming = Trimming()
trimming.freed(TRIM_AFTER_BYTES - 1)  # not enough for it to be worth while
freed = resident() - before
trimming.freed(1)
trimmed = resident() - before
assert float(kept[-1].sum()) == 0.0
print(whole, freed, trimmed)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory so"
)
def test_memory_freed_between_blocks_in_use_goes_back() -> None:
    """In a process of its own, whose heap holds nothing that other tests have freed before."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, freed, trimmed = map(int, done.stdout.split())
    assert whole > 90_000  # kB: the blocks are there
    assert freed > 0.8 * whole  # what the call is there for
    assert trimmed < 0.7 * whole
