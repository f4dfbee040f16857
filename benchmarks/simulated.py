"""A cluster of inference servers as discrete events: batches step, requests join and leave them.

A replica steps like an engine with continuous batching: every step gives each running request a
token, and takes in waiting ones where there is a seat, until their prompts fill the step's budget.
Servers of one LoRA per task have slots too: a request joins only when its task's LoRA is in one,
and a slot is free for another LoRA only while none of its requests run. Times of steps are linear
in what is computed.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy
from numpy.typing import NDArray

from polyhead.server.scale.affinity import choose

Process = Generator[simpy.Event, None, None]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step: `fixed + row * requests + prompt_token * tokens of new prompts`."""

    fixed: float
    row: float
    prompt_token: float

    def of(self, rows: int, prompt_tokens: int) -> float:
        return self.fixed + self.row * rows + self.prompt_token * prompt_tokens


@dataclass(frozen=True)
class Server:
    """One kind of server. slots: LoRAs that its batch can hold, None where tasks need none."""

    name: str
    times: StepTimes
    seats: int
    budget: int = 128
    """Tokens of prompts in one step; the last prompt may exceed it."""
    slots: int | None = None
    load_seconds: float = 0.0
    """What a step takes longer for each LoRA that is brought into a slot."""


@dataclass(frozen=True)
class Load:
    """Requests over tasks of a power law: the i-th task's share is as `i ** -alpha`."""

    rate: float  # requests per second
    tasks: int
    alpha: float = 1.0
    cv: float = 1.0  # of the gamma distributed pauses between arrivals; 1 is a Poisson process
    prompt: tuple[int, int] = (32, 128)
    new_tokens: tuple[int, int] = (32, 64)


@dataclass
class Asked:
    """One request and what became of it; times in seconds of the simulation."""

    task: int
    prompt: int
    left: int
    arrived: float
    first_token: float | None = None
    ended: float | None = None


@dataclass
class Replica:
    """A server with its line, its batch and, where it has them, its slots."""

    env: simpy.Environment
    server: Server
    line: deque[Asked] = field(default_factory=deque)
    batch: list[Asked] = field(default_factory=list)
    resident: OrderedDict[int, None] = field(default_factory=OrderedDict)
    most_tasks: int = 0
    wake: simpy.Event | None = None

    @property
    def load(self) -> int:
        return len(self.line) + len(self.batch)

    def submit(self, asked: Asked) -> None:
        self.line.append(asked)
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()

    def run(self) -> Process:
        while True:
            if not self.load:
                self.wake = self.env.event()
                yield self.wake
            prompts, loads = self._admit()
            seconds = self.server.times.of(len(self.batch), prompts)
            yield self.env.timeout(seconds + loads * self.server.load_seconds)
            self._advance()

    def _admit(self) -> tuple[int, int]:
        """Take in who fits, in order of arrival; who lacks a slot is passed by. Answers the tokens
        of their prompts and how many LoRAs were loaded."""
        running = Counter(asked.task for asked in self.batch)
        passed: list[Asked] = []
        prompts = loads = 0
        server = self.server
        while self.line and len(self.batch) < server.seats and prompts < server.budget:
            asked = self.line.popleft()
            loaded = self._place(asked.task, running)
            if loaded is None:
                passed.append(asked)
                continue
            loads += loaded
            prompts += asked.prompt
            running[asked.task] += 1
            self.batch.append(asked)
        self.line.extendleft(reversed(passed))
        self.most_tasks = max(self.most_tasks, len(running))
        return prompts, loads

    def _place(self, task: int, running: Counter[int]) -> int | None:
        """LoRAs to load before this task can run: 0 or 1; None where no slot is free."""
        if self.server.slots is None:
            return 0
        known = task in self.resident
        if not known and len(self.resident) >= self.server.slots:
            idle = next((other for other in self.resident if not running[other]), None)
            if idle is None:
                return None
            del self.resident[idle]
        self.resident[task] = None
        self.resident.move_to_end(task)
        return int(not known)

    def _advance(self) -> None:
        for asked in self.batch:
            asked.left -= 1
            if asked.first_token is None:
                asked.first_token = self.env.now
            if not asked.left:
                asked.ended = self.env.now
        self.batch = [asked for asked in self.batch if asked.left]


def simulate(
    server: Server, replicas: int, load: Load, seconds: float, seed: int = 0
) -> list[Asked]:
    """Every request that arrives within `seconds`; those still running then have not ended."""
    env = simpy.Environment()
    cluster = {f"r{number}": Replica(env, server) for number in range(replicas)}
    for replica in cluster.values():
        env.process(replica.run())
    asked: list[Asked] = []
    env.process(_arrive(env, cluster, load, seconds, asked, np.random.default_rng(seed)))
    env.run(until=seconds)
    return asked


def _arrive(
    env: simpy.Environment,
    cluster: dict[str, Replica],
    load: Load,
    seconds: float,
    asked: list[Asked],
    draw: np.random.Generator,
) -> Process:
    """Requests go where a gateway would send them, for every kind of server alike."""
    shape = load.cv**-2
    shares = popularity(load.tasks, load.alpha).cumsum()
    while True:
        yield env.timeout(draw.gamma(shape, 1 / (load.rate * shape)))
        if env.now >= seconds:
            return
        task = int(shares.searchsorted(draw.random(), side="right"))
        new = Asked(
            min(task, load.tasks - 1),
            int(draw.integers(*load.prompt, endpoint=True)),
            int(draw.integers(*load.new_tokens, endpoint=True)),
            env.now,
        )
        asked.append(new)
        loads = {name: replica.load for name, replica in cluster.items()}
        first = choose(f"task-{new.task}", loads)[0]
        cluster[min(first, key=loads.__getitem__)].submit(new)


def popularity(tasks: int, alpha: float) -> NDArray[np.float64]:
    """The share of every task, the most popular first; `[tasks]`, summing to 1."""
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


def on_time(asked: Sequence[Asked], target: float, warm: float, until: float) -> float:
    """Share of the requests that had their first token within `target` seconds, of those that
    arrived after `warm` and long enough before `until` to tell."""
    counted = [one for one in asked if warm <= one.arrived <= until - target]
    good = [
        one
        for one in counted
        if one.first_token is not None and one.first_token - one.arrived <= target
    ]
    return len(good) / len(counted) if counted else 1.0


def replicas_needed(
    server: Server, load: Load, target: float, seconds: float, share: float = 0.99, most: int = 4096
) -> int | None:
    """The least replicas that have `share` of the requests on time; None if over `most`."""

    def enough(count: int) -> bool:
        asked = simulate(server, count, load, seconds)
        return on_time(asked, target, seconds / 4, seconds) >= share

    high = 1
    while not enough(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
