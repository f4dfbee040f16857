"""Giving freed memory back to the system."""

import ctypes


def trim_heap() -> None:
    """Return what was freed in between blocks that are still in use.

    glibc keeps it, and hands it out badly again where blocks are aligned, as tensors are: a
    catalogue that replaces its content ten times over grew by half. Other C libraries have no such
    call and no such need.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
