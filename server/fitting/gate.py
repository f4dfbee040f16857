"""How the worker gives way: when it computes, with how many threads, at which priority."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Gate:
    """Called between two pieces of a fit; holds it while the server has requests to answer.

    While the server is busy, computing takes at most `share` of the time, on one thread; while it
    is not, all of the time, on `threads`. `set_busy` and `hurry` may be called from any thread,
    `pass_through` from the computing one.
    """

    def __init__(self, share: float, threads: int, set_threads: Callable[[int], None]) -> None:
        self._share = share
        self._threads = threads
        self._set_threads = set_threads
        self._change = threading.Condition()
        self._busy = False
        self._hurry = False
        self._since = time.monotonic()
        self._using = 0

    def set_busy(self, busy: bool) -> None:
        with self._change:
            self._busy = busy
            self._change.notify_all()

    def hurry(self) -> None:
        """End the pause at once: the fit is to notice something."""
        with self._change:
            self._hurry = True
            self._change.notify_all()

    def begin(self) -> None:
        """What was done until now, loading and waiting for work, is no piece of a fit."""
        self._since = time.monotonic()

    def pass_through(self) -> None:
        """Return when the next piece may be computed."""
        computed = time.monotonic() - self._since
        end = time.monotonic() + computed * (1 - self._share) / self._share
        with self._change:
            while self._busy and not self._hurry and (left := end - time.monotonic()) > 0:
                self._change.wait(left)
            self._hurry = False
            wanted = 1 if self._busy else self._threads
        if wanted != self._using:
            self._set_threads(wanted)
            self._using = wanted
        self._since = time.monotonic()


def yield_everything() -> None:
    """Make this process the last to be given a core and the first to lose its memory.

    Each where the system knows it and allows it.
    """
    with suppress(OSError):
        os.nice(19)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
