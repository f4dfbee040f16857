"""The lane: the thread that takes queued jobs, hands them to the worker and keeps its results."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from polyhead.adapters.inventory import Inventory
from polyhead.server.fitting.batch import Batch, Outcome
from polyhead.server.fitting.board import Board
from polyhead.server.fitting.process import Worker, WorkerDied, WorkerOptions
from polyhead.server.fitting.state_files import StateFiles
from polyhead.server.metrics import Metrics
from polyhead.server.tasks.errors import RegistryUnavailable
from polyhead.server.tasks.job import Job, Order
from polyhead.server.tasks.jobs import Jobs
from polyhead.server.tasks.leases import Leases
from polyhead.server.tasks.outages import Outage

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK = 0.02
"""Seconds between two looks at whether the engine is busy while a fit runs."""
BUSY_SECONDS = 0.3
"""How long the server counts as busy after its last request: the next one is on its way."""
RETRY_SECONDS = 1.0
MAX_STARTS = 2
"""A job that has lost its worker so often fails."""


@dataclass(frozen=True)
class LaneOptions:
    """How the lane works. folder: of the state files; it is made when it is missing."""

    worker: WorkerOptions
    folder: Path
    batch_jobs: int
    idle_seconds: float


class Lane:
    """Runs jobs until it is stopped. `busy` tells whether the engine has requests to answer.

    Everything but `_main` and what it calls may be called from any thread.
    """

    def __init__(
        self,
        jobs: Jobs,
        inventory: Inventory,
        board: Board,
        metrics: Metrics,
        busy: Callable[[], bool],
        options: LaneOptions,
    ) -> None:
        self._jobs = jobs
        self._inventory = inventory
        self._board = board
        self._metrics = metrics
        self._busy = busy
        self._options = options
        self._state_files = StateFiles(options.folder, inventory.fingerprint)
        self._news = threading.Condition()
        self._work_may_wait = True
        self._stopping = False
        self._cancelled: set[str] = set()
        self._worker: Worker | None = None
        self._last_busy = 0.0
        self._leases = Leases(jobs, self.cancel, self.wake)
        self._thread = threading.Thread(target=self._main, name="polyhead-fitting", daemon=True)

    def start(self) -> None:
        """Queue again what the last run left open, and go on with it."""
        self._leases.start()
        self._state_files.keep(self._jobs.recover())
        self._thread.start()

    @property
    def worker_pid(self) -> int | None:
        """The process that fits, while there is one."""
        worker = self._worker
        return worker.pid if worker is not None and worker.alive else None

    def wake(self) -> None:
        """A job has been queued."""
        with self._news:
            self._work_may_wait = True
            self._news.notify_all()

    def cancel(self, job_id: str) -> None:
        """A job has been cancelled: leave off fitting it."""
        with self._news:
            self._cancelled.add(job_id)
        self._board.changed(job_id)

    def stop(self, seconds: float = 10.0) -> None:
        """Save what runs, to be resumed at the next start, and end the worker.

        A worker that takes longer than `seconds` is ended without it. May be called twice.
        """
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if not self._thread.is_alive():
            return
        self._thread.join(seconds)
        worker = self._worker
        if self._thread.is_alive() and worker is not None:
            logger.warning("the fit did not stop within %g s; it starts anew next time", seconds)
            worker.kill()
            self._thread.join(seconds)

    def _main(self) -> None:
        outage = Outage(logger, "jobs have to wait")
        while not self._stopping:
            try:
                taken = self._jobs.take(self._options.batch_jobs)
                outage.over()
                if taken:
                    self._run([*taken])
                else:
                    self._wait()
            except RegistryUnavailable as exc:
                outage.failed(exc)
                self._nap(RETRY_SECONDS)
            except Exception:
                logger.exception("the fitting lane stumbled")
                self._nap(RETRY_SECONDS)
        self._let_go()
        self._leases.stop()
        self._board.close()

    def _wait(self) -> None:
        """Until a job is queued; the worker is ended when that takes long."""
        with self._news:
            rested = True
            if not self._work_may_wait and not self._stopping:
                rested = self._news.wait(self._options.idle_seconds if self._worker else None)
            self._work_may_wait = False
        if not rested:
            self._let_go()  # not under the lock: it may take a while

    def _run(self, taken: list[tuple[Job, Order]]) -> None:
        batch = Batch(taken, self._inventory, self._jobs, self._board, self._persistently)
        for job, _ in taken:
            self._board.begin(job.id)
        try:
            outcome = self._watch(batch, self._ready_worker())
        except WorkerDied as exc:
            self._worker = None
            self._metrics.fit_worker_deaths.inc()
            logger.error("%d jobs lost their worker: %s", len(taken), exc)
            outcome = Outcome("died", str(exc))
        self._settle(batch, outcome)

    def _watch(self, batch: Batch, worker: Worker) -> Outcome:
        """Relay between worker, jobs and engine until the batch is over. Raises `WorkerDied`."""
        state_file = str(self._state_files.path(batch.id))
        worker.send({"do": "fit", "state_file": state_file, **batch.order()})
        stopping, counted = False, time.monotonic()
        while True:
            now = time.monotonic()
            self._metrics.fit_seconds.inc(now - counted)
            counted = now
            worker.set_busy(self._engine_is_busy())
            for job_id in self._newly_cancelled(batch):
                worker.send({"do": "cancel", "job": job_id})
            if self._stopping and not worker.ready:
                worker.kill()
                return Outcome("stopped")
            if self._stopping and not stopping:
                stopping = True
                worker.send({"do": "stop"})
            found = worker.receive(TICK)
            if found is not None and (outcome := batch.take(*found)) is not None:
                return outcome

    def _settle(self, batch: Batch, outcome: Outcome) -> None:
        """Bring every job of the batch that has not ended to where it belongs."""
        left = batch.open_jobs()
        if outcome.kind == "stopped" or self._stopping:
            self._persistently(partial(self._jobs.put_back, left, attempted=False))
        else:
            alone = outcome.kind == "failed" and len(batch.jobs) == 1
            reason = outcome.reason or "the fit ended without a result"
            starts = 1 if alone else MAX_STARTS
            self._persistently(partial(self._jobs.fail_running, left, reason, starts))
        if outcome.kind != "stopped":
            self._state_files.drop(batch.id)
        for job_id in batch.jobs:
            self._board.end(job_id)
            job = self._persistently(partial(self._jobs.get, job_id))
            if job is not None and not job.is_open:
                self._metrics.fit_jobs.labels(job.state).inc()

    def _ready_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self._options.worker)
        return self._worker

    def _let_go(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _engine_is_busy(self) -> bool:
        now = time.monotonic()
        if self._busy():
            self._last_busy = now
        return now - self._last_busy < BUSY_SECONDS

    def _newly_cancelled(self, batch: Batch) -> set[str]:
        with self._news:
            found = self._cancelled & batch.jobs.keys()
            self._cancelled.clear()  # the others were not running
        return found

    def _persistently(self, work: Callable[[], T]) -> T | None:
        """Try until the database takes it: a result that took minutes is not thrown away because
        the disk was full for one. None when the server stops before that."""
        outage = Outage(logger, "a job's state cannot be kept")
        while True:
            try:
                found = work()
                outage.over()
                return found
            except RegistryUnavailable as exc:
                outage.failed(exc)
                if self._stopping:
                    return None
                self._nap(RETRY_SECONDS)

    def _nap(self, seconds: float) -> None:
        with self._news:
            if not self._stopping:
                self._news.wait(seconds)
