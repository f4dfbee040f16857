"""Where calls wait until there is room for their private adapter."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from polyhead.server.http.bodies import Pool
from polyhead.server.tasks.errors import SlotsBusy
from polyhead.server.tasks.slots import Slots

P = ParamSpec("P")
T = TypeVar("T")


class Room:
    """Runs admissions in the pool, those that found all slots taken again once one is let go.

    First come, first served. Nothing but the call itself waits: no thread, and no step.
    """

    def __init__(self, pool: Pool, slots: Slots, seconds: float, most: int) -> None:
        """seconds: how long a call waits. most: how many may."""
        self._pool = pool
        self._seconds = seconds
        self._most = most
        self._line: deque[asyncio.Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self.longest_handover = 0.0
        """Seconds from a slot's release to the first in line having it, the longest so far."""
        slots.on_release = self._released

    @property
    def waiting(self) -> int:
        """How many calls wait for a slot."""
        return len(self._line)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work(*args, **kwargs)`, or what it raises: `SlotsBusy` only after having
        waited."""
        with contextlib.suppress(SlotsBusy):
            return await self._pool.run(work, *args, **kwargs)
        if len(self._line) >= self._most:
            return await self._pool.run(work, *args, **kwargs)
        turn = asyncio.Event()
        self._line.append(turn)
        self._wake()  # a slot may have been let go since, when nobody stood here
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    return await self._in_turn(turn, partial(work, *args, **kwargs))
            return await self._pool.run(work, *args, **kwargs)  # or the refusal
        finally:
            self._line.remove(turn)
            self._wake()  # there may be room for the next one too

    async def _in_turn(self, turn: asyncio.Event, work: Callable[[], T]) -> T:
        # No refusal is kept in a variable: its traceback would hold this frame, and with it what
        # the work found, long after the call.
        while True:
            await turn.wait()
            turn.clear()
            told = time.monotonic()
            with contextlib.suppress(SlotsBusy):
                found = await self._pool.run(work)
                self.longest_handover = max(self.longest_handover, time.monotonic() - told)
                return found

    def _released(self) -> None:
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False
        if self._line:
            self._line[0].set()
