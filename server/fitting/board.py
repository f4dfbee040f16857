"""What running jobs tell: the curve of each, and who is to be woken by news."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOST_POINTS = 512
"""Points of a curve that are kept; then every second one goes."""
MOST_CURVES = 64
"""Ended runs whose curves are kept, for whoever asks a little late."""

Progress = dict[str, Any]


class Curve:
    """A job's progress since its run began, each point with its number."""

    def __init__(self) -> None:
        self.points: list[tuple[int, Progress]] = []
        self._began: tuple[float, int] | None = None
        self._last = 0

    def add(self, number: int, progress: Progress) -> None:
        """Keep one report; its time left follows from the pace so far."""
        now, step = time.monotonic(), int(progress["step"])
        if self._began is None or step < self._last:  # another method begins
            self._began = now, step
        self._last = step
        began, first = self._began
        left = None
        if step > first:
            left = round((now - began) / (step - first) * (progress["steps"] - step), 1)
        if len(self.points) >= MOST_POINTS:
            del self.points[1::2]
        self.points.append((number, {**progress, "seconds_left": left}))


class Board:
    """Safe to call from any thread. Listeners are called on the thread that brings the news."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._curves: dict[str, Curve] = {}
        self._ended: list[str] = []
        self._numbers = itertools.count(1)
        self._listeners: dict[str, list[Callable[[], None]]] = {}
        self.closed = False

    def begin(self, job_id: str) -> None:
        """A run begins; what an earlier one told does not count any more."""
        with self._lock:
            self._curves[job_id] = Curve()
        self.changed(job_id)

    def tell(self, job_id: str, progress: Progress) -> None:
        """A running job has come further."""
        with self._lock:
            self._curves[job_id].add(next(self._numbers), progress)
        self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """The job's state is a new one: wake its listeners."""
        with self._lock:
            listeners = list(self._listeners.get(job_id, ()))
        for listener in listeners:
            listener()

    def end(self, job_id: str) -> None:
        """A run is over."""
        with self._lock:
            self._ended.append(job_id)
            if len(self._ended) > MOST_CURVES:
                self._curves.pop(self._ended.pop(0), None)
        self.changed(job_id)

    def curve(self, job_id: str, after: int = 0) -> Sequence[tuple[int, Progress]]:
        """What a job has told after point number `after`, in order, with the numbers."""
        with self._lock:
            found = self._curves.get(job_id)
            return [point for point in found.points if point[0] > after] if found else []

    @contextmanager
    def listening(self, job_id: str, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` at every news of the job; it must not block."""
        with self._lock:
            self._listeners.setdefault(job_id, []).append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners[job_id].remove(listener)
                if not self._listeners[job_id]:
                    del self._listeners[job_id]

    def close(self) -> None:
        """No more news will come: wake everyone to see it."""
        self.closed = True
        with self._lock:
            waiting = list(self._listeners)
        for job_id in waiting:
            self.changed(job_id)
