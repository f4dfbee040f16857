"""Memory really goes back."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from polyhead.server.tasks.heap import trim_heap


def resident_bytes() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1]) << 10


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory so"
)
def test_memory_freed_between_blocks_in_use_goes_back() -> None:
    before = resident_bytes()
    blocks = [torch.zeros(12_500) for _ in range(2000)]  # 50 kB each
    whole = resident_bytes() - before
    kept = blocks[::2]
    del blocks
    gc.collect()
    freed = resident_bytes() - before
    trim_heap()
    trimmed = resident_bytes() - before
    assert freed > 0.8 * whole  # what the call is there for
    assert trimmed < 0.7 * whole
    assert float(kept[-1].sum()) == 0.0
