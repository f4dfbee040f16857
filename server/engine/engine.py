"""The engine: a thread that schedules, runs and publishes until it is told to stop."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from polyhead.server.engine.answers import Answers
from polyhead.server.engine.batch import Batch
from polyhead.server.engine.errors import (
    EngineDead,
    EngineDraining,
    EngineFull,
    RequestTooLarge,
)
from polyhead.server.engine.pace import Pace
from polyhead.server.engine.request import Event, Failure, Request, row_lengths
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler
from polyhead.server.engine.step_record import StepRecord
from polyhead.server.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Publish = Callable[[list[Event]], None]
Watch = Callable[[StepRecord], None]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot, taken between two steps."""

    running: int = 0  # sequences
    waiting: int = 0  # sequences
    requests: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    step_tasks: int = 0  # distinct tasks of the last step
    step_seconds: float = 0.0  # of the last step


class Engine:
    """Thread-safe front of the engine thread.

    publish: called on the engine's thread, once per step, with that step's events.
    on_death: called on the engine's thread if it ends by an error; nothing is answered after it.
    max_wait: seconds that a request may be expected to wait before it is refused.
    watch: called on the engine's thread after each step with what it did.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        publish: Publish,
        *,
        max_waiting: int = 1024,
        max_wait: float = inf,
        on_death: Callable[[BaseException], None] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._answers = Answers(tokenizer)
        self._publish = publish
        self._on_death = on_death
        self._watch = watch
        self._max_waiting = max_waiting
        self._max_wait = max_wait
        self._pace = Pace(max_wait)
        self._inbox: deque[Request] = deque()
        self._aborted: set[str] = set()
        self._started: dict[str, float] = {}  # requests in a step without an output so far
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self._death: BaseException | None = None
        self._stats = EngineStats(kv_capacity_tokens=scheduler.space.budget)
        self._thread = threading.Thread(target=self._main, name="polyhead-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._death is None

    @property
    def draining(self) -> bool:
        return self._draining

    def stats(self) -> EngineStats:
        return self._stats

    def active_tasks(self) -> tuple[set[str], set[str]]:
        """Tasks with running and with waiting sequences, as of now. From any thread."""
        scheduler = self._scheduler
        running = {sequence.request.task for sequence in list(scheduler.running)}
        return running, scheduler.line.tasks

    def submit(self, request: Request) -> None:
        """Put a request in line.

        Raises `EngineDead`, `EngineDraining`, `EngineFull`, or `RequestTooLarge` when the request
        could not be computed even with the whole cache to itself.
        """
        space = self._scheduler.space
        lengths = row_lengths(request)
        if not space.fits(*lengths):
            raise RequestTooLarge(
                f"the request may come to {' and '.join(map(str, lengths))} tokens; the cache "
                f"holds {space.longest} in a row and {space.budget} in all"
            )
        with self._wake:
            self._check_open()
            ahead = self._pace.ahead_of(request)
            self._check_wait(ahead)
            self._pace.joins(request, ahead)
            self._inbox.append(request)
            self._wake.notify()

    def check(self, task: str, priority: int = 0, answer: int = 1) -> None:
        """Raise what `submit` would of any request of a task that may take `answer` tokens.

        Takes microseconds, so that under overload nothing is read or tokenised in vain.
        """
        with self._wake:
            self._check_open()
            self._check_wait(self._pace.least_ahead_of(task, priority, answer))

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineDead("the engine has stopped after an error") from self._death
        if self._draining or self._stopping:
            raise EngineDraining("the server is shutting down")
        waiting = len(self._inbox) + self._stats.waiting
        if waiting >= self._max_waiting:
            raise EngineFull(f"{waiting} requests are waiting", retry_after=1.0)

    def _check_wait(self, ahead: float) -> None:
        wait = self._pace.seconds(ahead)
        if wait > self._max_wait:
            raise EngineFull(
                f"the request would wait for about {wait:.0f} s, over {self._max_wait:g} s",
                retry_after=wait - self._max_wait,
            )

    def abort(self, request_id: str) -> None:
        """End a request; its last event has the finish reason "abort". Unknown ids are ignored."""
        with self._wake:
            self._aborted.add(request_id)
            self._wake.notify()

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the others. False when some are left after `seconds`."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        deadline = time.monotonic() + seconds
        while self.alive and (self._inbox or self._stats.requests):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def stop(self) -> None:
        """End the thread after the current step; what still runs is aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
            self._publish(self._answers.abort_all())
        except BaseException as exc:  # the thread's last act is to say why it ends
            logger.critical("the engine has died", exc_info=exc)
            self._die(exc)

    def _die(self, cause: BaseException) -> None:
        with self._wake:
            self._death = cause
        lost = {request.id for request in self._inbox} | self._answers.open_requests
        try:
            self._publish([Failure(request_id, "the engine has died") for request_id in lost])
        except Exception:  # publishing may be what it died of
            logger.exception("%d requests could not be told", len(lost))
        if self._on_death is not None:
            self._on_death(cause)

    def _wait_for_work(self) -> bool:
        """Take in what was submitted and aborted. False when it is time to stop."""
        if not self._busy():
            self._runner.carry_out(self._scheduler.space.drain())  # give freed memory back
        with self._wake:
            while not (self._inbox or self._aborted or self._stopping or self._busy()):
                self._wake.wait()
            for request in self._inbox:
                patience = self._pace.patience_of(request.id)
                for sequence in self._answers.open(request, patience):
                    self._scheduler.add(sequence)
            self._inbox.clear()
            self._count()  # under the lock: at no moment is a request counted nowhere
            aborted, self._aborted = self._aborted, set()
        events = self._answers.abort(aborted) + self._answers.expire(time.monotonic())
        self._retire(events)
        return not self._stopping

    def _busy(self) -> bool:
        return bool(self._answers.open_requests)

    def _step(self) -> None:
        """Schedule, run, publish."""
        started = time.monotonic()
        batch = self._scheduler.schedule()
        if batch is None:
            self._count()
            return
        scheduled = time.monotonic()
        self._note_starts(batch, scheduled)
        try:
            sampled = self._runner.run(batch)
        except EngineDead:
            raise
        except Exception as exc:
            logger.exception("a step of %d rows has failed", len(batch.rows))
            self._fail(batch, exc)
            return
        computed = time.monotonic()
        self._scheduler.advance(batch)
        self._retire(self._answers.take(batch, sampled))
        ended = time.monotonic()
        record = self._record(batch, scheduled - started, ended - computed)
        with self._wake:
            self._pace.stepped(batch.tokens, ended - started)
        self._stats = replace(
            self._stats,
            steps=self._stats.steps + 1,
            step_tasks=record.tasks,
            step_seconds=ended - started,
        )
        self._count()
        if self._watch is not None:
            self._watch(record)

    def _record(self, batch: Batch, schedule: float, publish: float) -> StepRecord:
        report = self._runner.report
        phases = {"schedule": schedule, "forward": report.forward, "sample": report.sample}
        return StepRecord(
            rows=len(batch.rows),
            tokens=batch.tokens,
            tasks=len({row.sequence.request.task for row in batch.rows}),
            forms=report.forms,
            seconds={**phases, "publish": publish},
        )

    def _note_starts(self, batch: Batch, now: float) -> None:
        for row in batch.rows:
            request = row.sequence.request
            if row.start < max(len(request.prompt), 1):
                self._started.setdefault(request.id, now)
        for source in batch.sources:
            for name in source.requests:
                self._started.setdefault(name, now)
        with self._wake:
            scheduler = self._scheduler
            self._pace.begun(batch.requests, scheduler.free_seats, len(scheduler.line))

    def _fail(self, batch: Batch, exc: Exception) -> None:
        """End the requests of a failed step; the others compute their tokens anew."""
        self._scheduler.preempt_all()
        self._scheduler.space.clear()
        self._runner.reset()
        self._retire(self._answers.fail(batch.requests, f"{type(exc).__name__}: {exc}"))
        self._stats = replace(self._stats, failed_steps=self._stats.failed_steps + 1)
        self._count()

    def _retire(self, events: list[Event]) -> None:
        for sequence in self._answers.finished():
            self._scheduler.finish(sequence)
            with self._wake:
                self._pace.ended(sequence)
        if events:
            self._publish([self._stamped(event) for event in events] if self._started else events)

    def _stamped(self, event: Event) -> Event:
        """A request's first event after it entered a step says when that was."""
        started = self._started.pop(event.request_id, None)
        if started is None or isinstance(event, Failure):
            return event
        return replace(event, started=started)

    def _count(self) -> None:
        scheduler = self._scheduler
        self._stats = replace(
            self._stats,
            running=len(scheduler.running),
            waiting=len(scheduler.line),
            requests=len(self._answers.open_requests),
            kv_used_tokens=scheduler.reuse.used,
            preemptions=scheduler.preemptions,
        )
