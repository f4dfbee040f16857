"""Under several times the load, whoever is let in begins when it was told, whatever its task.

The real waiting line, guess of the wait and scheduler, in a time that steps take as on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import pytest
from scheduler_world import World, ask

from polyhead.server.engine import pace as pace_module
from polyhead.server.engine.pace import Pace
from polyhead.server.engine.request import Request

SEATS = 64
BUDGET = 128


def arrivals(shares: Sequence[float], rate: float, seconds: float) -> list[Request]:
    """Requests of tasks of these shares, so many a second."""
    draw = np.random.default_rng(0)
    moments = np.cumsum(draw.exponential(1 / rate, int(rate * seconds)))
    tasks = draw.choice(len(shares), len(moments), p=np.array(shares) / sum(shares))
    return [
        ask(f"{number}", f"t{task}", int(draw.integers(32, 128)), 48, arrival=float(moment))
        for number, (moment, task) in enumerate(zip(moments, tasks, strict=True))
    ]


@dataclass
class Overloaded:
    """A server in a time of its own: about 400 tokens a second in full steps."""

    max_wait: float
    world: World = field(default_factory=lambda: World(SEATS, BUDGET, 65_536))
    now: float = 0.0
    refused: int = 0
    begun: dict[str, float] = field(default_factory=dict)  # request → seconds that it waited

    def take(self, requests: Sequence[Request]) -> None:
        pace, line = Pace(self.max_wait), list(requests)
        open_requests: dict[str, Request] = {}
        while line or self.world.answers.open_requests:
            while line and line[0].arrival <= self.now:
                request = line.pop(0)
                ahead = pace.ahead_of(request)
                if pace.seconds(ahead) > self.max_wait:
                    self.refused += 1
                    continue
                pace.joins(request, ahead)
                self.world.submit(request, patience=pace.patience_of(request.id))
                open_requests[request.id] = request
            self._step(pace, open_requests)
            if line and not self.world.answers.open_requests:
                self.now = max(self.now, line[0].arrival)

    def _step(self, pace: Pace, requests: dict[str, Request]) -> None:
        batch, scheduler = self.world.step(), self.world.scheduler
        if batch is None:
            return
        for name in batch.requests:
            self.begun.setdefault(name, self.now - requests[name].arrival)
        pace.begun(batch.requests, scheduler.free_seats, len(scheduler.line))
        seconds = 0.03 + 0.0022 * batch.tokens
        self.now += seconds
        pace.stepped(batch.tokens, seconds)


def popular(tasks: int) -> list[float]:
    return [1 / (rank + 1) for rank in range(tasks)]


def longest_wait(max_wait: float) -> float:
    """Of all who were let in at six times what can be done, 200 tasks by a power law."""
    overloaded = Overloaded(max_wait)
    overloaded.take(arrivals(popular(200), 25, 30))
    assert overloaded.refused > 400
    assert len(overloaded.begun) > 100
    return max(overloaded.begun.values())


def test_whoever_is_let_in_begins_within_twice_the_longest_wait() -> None:
    assert longest_wait(3.0) < 6.0


def test_without_patience_that_ends_the_popular_tasks_wait_for_the_overload_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace_module, "PATIENCE", inf)
    assert longest_wait(3.0) > 20.0


def test_a_crowd_that_others_come_before_does_not_hold_them_up() -> None:
    """A fifth of the requests are of a task that takes less than its half of the server."""
    requests = arrivals([4, 1], 8, 90)
    overloaded = Overloaded(60.0)
    overloaded.take(requests)
    by_task: dict[str, list[float]] = {"t0": [], "t1": []}
    for request in requests:
        if request.id in overloaded.begun:
            by_task[request.task].append(overloaded.begun[request.id])
    assert np.median(by_task["t1"]) < 4.0
    assert np.median(by_task["t0"]) > 30.0
    assert max(by_task["t0"]) < 1.25 * 60
