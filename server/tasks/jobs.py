"""The durable jobs: every change of their states."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from polyhead.adapters.errors import AdapterError
from polyhead.server.tasks import job_rows, store
from polyhead.server.tasks.contents import Content
from polyhead.server.tasks.cursors import decode_cursor, encode_cursor
from polyhead.server.tasks.errors import (
    JobEnded,
    JobTakenOver,
    StaleGeneration,
    TaskBeingFitted,
    TaskExists,
    TooManyJobs,
    UnknownTask,
)
from polyhead.server.tasks.job import Job, JobState, Order, new_batch_id, new_job_id
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.task import Task, check_id

MAX_ATTEMPTS = 3
"""Starts that a job may have, over crashes of the server and of the worker."""
QUEUED: Mapping[str, Any] = {"state": "queued", "owner": None, "lease": None}
KEPT = 1000
"""Ended jobs that are remembered, with their examples."""


LEASE_SECONDS = 15.0
"""After which a server that was not heard of is taken for dead, and its jobs are run elsewhere."""


class Jobs:
    """The jobs of one registry, in its database; safe to call from any thread.

    What a call changed is on disk when it returns. Every method raises `RegistryUnavailable` where
    the database or its disk refuses.

    max_open: jobs that may be queued or running. clock: seconds, which nobody sets.
    """

    def __init__(
        self,
        registry: Registry,
        max_open: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._database = registry.database
        self._max_open = max_open
        self._clock = clock
        self._owner = "alone"
        self._heard: dict[tuple[str, datetime], float] = {}  # leases of others, since when seen
        self._looked = clock()

    @property
    def data_dir(self) -> Path:
        """The folder of the server that runs them."""
        return self._registry.data_dir

    def run_as(self, owner: str) -> None:
        """Take jobs in the name of this server; without it nobody else may be running any."""
        self._owner = owner

    def submit_new(self, task_id: str, order: Order) -> Job:
        """A job that registers a task once it has succeeded.

        Raises `InvalidId`, `ReservedId`, `TaskExists`, `TaskBeingFitted`, `TooManyJobs`.
        """
        check_id(task_id)
        with self._database.write() as connection:
            if store.exists_task(connection, task_id):
                raise TaskExists(task_id)
            return self._add(connection, task_id, None, order)

    def submit(self, task_id: str, order: Order, if_match: str | None = None) -> Job:
        """A job that gives a task that exists a new generation.

        Raises `UnknownTask`, `StaleGeneration`, `TaskBeingFitted`, `TooManyJobs`.
        """
        with self._database.write() as connection:
            task = store.claim(connection, task_id, if_match).task
            return self._add(connection, task_id, task.generation, order)

    def get(self, job_id: str) -> Job:
        """Raises `UnknownJob`."""
        with self._database.read() as connection:
            return job_rows.find(connection, job_id)

    def order(self, job_id: str) -> Order:
        """What a job was asked to do. Raises `UnknownJob`."""
        with self._database.read() as connection:
            return job_rows.order_of(connection, job_rows.find(connection, job_id).id)

    def list(
        self,
        limit: int = 100,
        cursor: str | None = None,
        task: str | None = None,
        state: JobState | None = None,
        prefix: str | None = None,
    ) -> tuple[Sequence[Job], str | None]:
        """Up to `limit` jobs, newest first, and the cursor of the next page; with `prefix` only
        jobs of tasks whose ids begin so.

        Raises `InvalidCursor`.
        """
        before = None if cursor is None else decode_cursor(cursor)
        with self._database.read() as connection:
            found = job_rows.page(connection, before, limit + 1, task, state, prefix)
        more = len(found) > limit
        return found[:limit], encode_cursor(found[limit - 1].id) if more else None

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self._database.read() as connection:
            return job_rows.counts(connection)

    def take(self, limit: int) -> Sequence[tuple[Job, Order]]:
        """Start the jobs that are to be fitted together next, at most `limit` that are new."""
        with self._database.write() as connection:
            line = job_rows.oldest(connection, "queued")
            chosen = job_rows.batch_of(line, limit)
            batch = next((job.batch for job in chosen if job.batch), None) or new_batch_id()
            started = [self._start(connection, job, batch) for job in chosen]
            return [(job, job_rows.order_of(connection, job.id)) for job in started]

    def note(self, progress: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep how far running jobs have come, by id."""
        with self._database.write() as connection:
            for job_id, values in progress.items():
                if self._runs(job_rows.claim(connection, job_id)):
                    job_rows.update(connection, job_id, {"progress": dict(values)})

    def succeed(self, job_id: str, content: Content, result: Mapping[str, Any]) -> Job:
        """Make the task's new generation and end the job, both or neither.

        Where the task is no longer what the job started from, or `content` does not fit, the job
        fails instead and says why. Raises `JobEnded` for a job that was cancelled meanwhile, and
        `JobTakenOver`.
        """
        job, order = self.get(job_id), self.order(job_id)
        kept: dict[str, Any] = dict(result)

        def end(connection: Connection, task: Task) -> None:
            kept["generation"] = task.generation
            _end(connection, self._own(connection, job_id), "succeeded", result=kept)

        provenance = {"how": "fitted", "job": job.id, "method": result.get("method")}
        fields: dict[str, Any] = {"template": order.template, "provenance": provenance}
        try:
            if job.base is None:
                fields |= {"defaults": order.defaults, "metadata": order.metadata}
                self._registry.create(job.task, content, **fields, also=end)
            else:
                self._registry.refit(job.task, content, **fields, if_match=job.base, also=end)
        except (TaskExists, UnknownTask, StaleGeneration, AdapterError) as exc:
            return self.fail(job_id, _why_not(exc))
        return self.get(job_id)

    def fail(self, job_id: str, error: str) -> Job:
        """End a job that is open. Raises `UnknownJob`, `JobEnded`, `JobTakenOver`."""
        with self._database.write() as connection:
            return _end(connection, self._own(connection, job_id), "failed", error=error)

    def cancel(self, job_id: str) -> Job:
        """End a job that is open; one that was cancelled before stays so.

        Raises `UnknownJob`, `JobEnded`.
        """
        with self._database.write() as connection:
            job = job_rows.claim(connection, job_id)
            return job if job.state == "cancelled" else _end(connection, job, "cancelled")

    def put_back(self, job_ids: Sequence[str], *, attempted: bool) -> None:
        """Queue running jobs again, to be resumed together; `attempted` counts the start."""
        with self._database.write() as connection:
            for job in (job_rows.claim(connection, job_id) for job_id in job_ids):
                if self._runs(job):
                    attempts = job.attempts if attempted else job.attempts - 1
                    values = {**QUEUED, "attempts": attempts}
                    job_rows.update(connection, job.id, values)

    def fail_running(self, job_ids: Sequence[str], error: str, starts: int = 1) -> None:
        """Fail those of the jobs that still run and have been started at least `starts` times; the
        others are queued again, each to be fitted by itself, so that the one that brought its
        batch down fails alone."""
        with self._database.write() as connection:
            for job in (job_rows.claim(connection, job_id) for job_id in job_ids):
                if self._runs(job) and job.attempts >= starts:
                    _end(connection, job, "failed", error=error)
                elif self._runs(job):
                    job_rows.update(connection, job.id, {**QUEUED, "batch": None})

    def recover(self) -> set[str]:
        """Queue again what this server was running when it ended, and what nobody runs any more;
        call before the first `take`.

        A job that was interrupted `MAX_ATTEMPTS` times fails: it may be what ends the server.
        Returns the batches that will be resumed.
        """
        with self._database.write() as connection:
            self._requeue(connection, lambda job: job.owner in (self._owner, None))
            return {job.batch for job in job_rows.oldest(connection, "queued") if job.batch}

    def renew(self) -> set[str]:
        """Say that this server lives. Returns the jobs that it runs."""
        with self._database.read() as connection:
            held = job_rows.running_of(connection, self._owner)
        if held:
            with self._database.write() as connection:
                job_rows.renew(connection, self._owner, self._lease(connection))
                held = job_rows.running_of(connection, self._owner)
        return held

    def recover_expired(self) -> None:
        """Queue again the jobs of servers that were not heard of for `LEASE_SECONDS`.

        A lease counts as a sign of life: it is the same for that long by this process's own clock,
        whatever the time of day is here or in the database. It has to be called more often than
        that; after an outage, in which nobody could renew anything, everyone has that long anew.
        """
        with self._database.read() as connection:
            leases = job_rows.leases_of_others(connection, self._owner)
        before, self._looked = self._looked, self._clock()
        if self._looked - before > LEASE_SECONDS:
            self._heard.clear()
        now = self._looked
        self._heard = {lease: self._heard.get(lease, now) for lease in leases}
        silent = {lease for lease, since in self._heard.items() if now - since >= LEASE_SECONDS}
        if silent:
            with self._database.write() as connection:
                self._requeue(connection, lambda job: (job.id, job.lease) in silent)

    def _requeue(self, connection: Connection, lost: Callable[[Job], bool]) -> None:
        for job in filter(lost, job_rows.oldest(connection, "running")):
            if job.attempts >= MAX_ATTEMPTS:
                error = f"the server ended {job.attempts} times while the job was running"
                _end(connection, job, "failed", error=error)
            else:
                job_rows.update(connection, job.id, QUEUED)

    def _lease(self, connection: Connection) -> datetime:
        return job_rows.now(connection) + timedelta(seconds=LEASE_SECONDS)

    def _runs(self, job: Job) -> bool:
        return job.state == "running" and job.owner == self._owner

    def _own(self, connection: Connection, job_id: str) -> Job:
        """A job to be ended by whoever runs it. Raises `UnknownJob`, `JobTakenOver`."""
        job = job_rows.claim(connection, job_id)
        if job.state == "running" and not self._runs(job):
            raise JobTakenOver(job_id)
        return job

    def _add(self, connection: Connection, task_id: str, base: str | None, order: Order) -> Job:
        other = job_rows.open_job_of(connection, task_id)
        if other is not None:
            raise TaskBeingFitted(task_id, other)
        counts = job_rows.counts(connection)
        if counts.get("queued", 0) + counts.get("running", 0) >= self._max_open:
            raise TooManyJobs(self._max_open)
        job = Job(
            id=new_job_id(),
            task=task_id,
            state="queued",
            base=base,
            batch=None,
            attempts=0,
            progress={},
            result=None,
            error=None,
            created_at=datetime.now(UTC),
            started_at=None,
            ended_at=None,
        )
        job_rows.add(connection, job, order)
        job_rows.drop_old(connection, KEPT)
        return job

    def _start(self, connection: Connection, job: Job, batch: str) -> Job:
        values: dict[str, Any] = {
            "state": "running",
            "batch": batch,
            "attempts": job.attempts + 1,
            "started_at": datetime.now(UTC),
            "owner": self._owner,
            "lease": self._lease(connection),
        }
        job_rows.update(connection, job.id, values)
        return replace(job, **values)


def _end(connection: Connection, job: Job, state: JobState, **values: Any) -> Job:
    if not job.is_open:
        raise JobEnded(job.id, job.state)
    ended = {"state": state, "ended_at": datetime.now(UTC), **values}
    job_rows.update(connection, job.id, ended)
    return replace(job, **ended)


def _why_not(exc: Exception) -> str:
    if isinstance(exc, TaskExists):
        return f"{exc} by someone else while the job was running; nothing was replaced"
    if isinstance(exc, UnknownTask):
        return f"the task was deleted while it was being fitted: {exc}"
    if isinstance(exc, StaleGeneration):
        return f"the task was changed while it was being fitted; its new version stays: {exc}"
    return f"the fitted adapter cannot be served: {exc}"
