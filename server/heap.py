"""Giving freed memory back to the system."""

import ctypes

TRIM_AFTER_BYTES = 64 << 20
"""How much is freed between two returns of it, which take about 10 ms each."""


class Trimming:
    """Gives memory back once for every `TRIM_AFTER_BYTES` that were freed. For one thread."""

    def __init__(self) -> None:
        self.untrimmed = 0  # bytes

    def freed(self, nbytes: int) -> None:
        """So much was freed in blocks that the heap may keep."""
        self.untrimmed += nbytes
        if self.untrimmed >= TRIM_AFTER_BYTES:
            self.untrimmed = 0
            trim_heap()


def trim_heap() -> None:
    """Return what was freed in between blocks that are still in use.

    glibc keeps it, and hands it out badly again where blocks are aligned, as tensors are: a
    catalogue that replaces its content ten times over grew by half. Other C libraries have no such
    call and no such need.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
