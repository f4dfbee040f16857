"""Where calls wait until there is room for their private adapter."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

from polyhead.server.http.bodies import Pool
from polyhead.server.tasks.catalogue import Catalogue
from polyhead.server.tasks.errors import SlotsBusy
from polyhead.server.tasks.staging import Staged

P = ParamSpec("P")
T = TypeVar("T")

STAGED_AHEAD = 4
"""Of the line, how many have their adapters read before it is their turn."""


@dataclass(eq=False)
class Waiting:
    """A call in line, with its adapter once that has been read ahead."""

    task_id: str
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    staged: Staged | None = None
    staging: asyncio.Task[None] | None = None


class Room:
    """Runs admissions in the pool, those that found all slots taken again once one is let go.

    First come, first served. Nothing but the call itself waits: no thread, and no step.
    """

    def __init__(self, pool: Pool, catalogue: Catalogue, seconds: float, most: int) -> None:
        """seconds: how long a call waits. most: how many may."""
        self._pool = pool
        self._catalogue = catalogue
        self._seconds = seconds
        self._most = most
        self._line: deque[Waiting] = deque()
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._freed: float | None = None  # when the first slot was that nobody is known to have
        self.clock: Callable[[], float] = time.monotonic
        self.longest_handover = 0.0
        """From a slot's release to the first in line having it, the longest so far, as the clock
        counts it: in seconds."""
        catalogue.slots.on_release = self._released

    @property
    def waiting(self) -> int:
        """How many calls wait for a slot."""
        return len(self._line)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work(*args, **kwargs)`, or what it raises: `SlotsBusy` only after having
        waited."""
        try:
            return await self._pool.run(work, *args, **kwargs)
        except SlotsBusy as busy:
            waiting = Waiting(busy.task_id)
        if len(self._line) >= self._most:
            return await self._pool.run(work, *args, **kwargs)
        if not self._line:
            self._freed = None
        self._line.append(waiting)
        self._wake()  # a slot may have been let go since, when nobody stood here
        self._look_ahead()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    return await self._in_turn(waiting, partial(work, *args, **kwargs))
            return await self._pool.run(work, *args, **kwargs)  # or the refusal
        finally:
            self._line.remove(waiting)
            self._wake()  # there may be room for the next one too
            self._look_ahead()

    async def _in_turn(self, waiting: Waiting, work: Callable[[], T]) -> T:
        # No refusal is kept in a variable: its traceback would hold this frame, and with it what
        # the work found, long after the call.
        while True:
            await waiting.turn.wait()
            waiting.turn.clear()
            with contextlib.suppress(SlotsBusy):
                found = await self._pool.run(work)
                if self._freed is not None:
                    took = self.clock() - self._freed
                    self.longest_handover = max(self.longest_handover, took)
                return found
            self._freed = None

    def _look_ahead(self) -> None:
        for waiting in islice(self._line, STAGED_AHEAD):
            if waiting.staged is None and (waiting.staging is None or waiting.staging.done()):
                waiting.staging = asyncio.create_task(self._stage(waiting))

    async def _stage(self, waiting: Waiting) -> None:
        with contextlib.suppress(Exception):  # the call will meet it too, and tell its client
            waiting.staged = await self._pool.run(self._catalogue.stage, waiting.task_id)

    def _released(self) -> None:
        if self._freed is None:
            self._freed = self.clock()
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False
        if self._line:
            self._line[0].turn.set()
