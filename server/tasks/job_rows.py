"""Rows of the jobs: every statement on them, each inside of a transaction of the caller's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    delete,
    func,
    insert,
    select,
    type_coerce,
)
from sqlalchemy import update as update_rows

from polyhead.server.tasks.errors import UnknownJob
from polyhead.server.tasks.job import OPEN, FitExample, Job, JobState, Order
from polyhead.server.tasks.models import UtcDateTime, jobs, orders
from polyhead.server.tasks.store import begins_with


def add(connection: Connection, job: Job, order: Order) -> None:
    connection.execute(insert(jobs), asdict(job))
    pairs = [[example.input, example.output] for example in order.examples]
    data = {**asdict(order), "examples": pairs}
    connection.execute(insert(orders), {"job_id": job.id, "data": data})


def find(connection: Connection, job_id: str) -> Job:
    """Raises `UnknownJob`."""
    return _one(connection, select(jobs).where(jobs.c.id == job_id), job_id)


def claim(connection: Connection, job_id: str) -> Job:
    """The job, held against other writers until the transaction ends. Raises `UnknownJob`."""
    return _one(connection, select(jobs).where(jobs.c.id == job_id).with_for_update(), job_id)


def order_of(connection: Connection, job_id: str) -> Order:
    """What a job that exists was asked to do."""
    statement = select(orders.c.data).where(orders.c.job_id == job_id)
    data: dict[str, Any] = connection.execute(statement).scalar_one()
    examples = tuple(FitExample(*pair) for pair in data["examples"])
    return Order(**{**data, "examples": examples})


def update(connection: Connection, job_id: str, values: Mapping[str, Any]) -> None:
    connection.execute(update_rows(jobs).where(jobs.c.id == job_id).values(**values))


def open_job_of(connection: Connection, task_id: str) -> str | None:
    """The id of the job of this task that has not ended."""
    return connection.scalar(select(jobs.c.id).where(jobs.c.task == task_id, _is_open()).limit(1))


def oldest(connection: Connection, state: JobState, limit: int | None = None) -> list[Job]:
    """Jobs in one state in the order they came, held against other writers."""
    statement = select(jobs).where(jobs.c.state == state).order_by(jobs.c.id).limit(limit)
    rows = connection.execute(statement.with_for_update(skip_locked=True))
    return [_job(row) for row in rows]


def now(connection: Connection) -> datetime:
    """The database's clock: those of several servers may differ."""
    return connection.execute(select(type_coerce(func.now(), UtcDateTime))).scalar_one()


def running_of(connection: Connection, owner: str) -> set[str]:
    """Ids of the jobs that a server runs."""
    wanted = (jobs.c.state == "running", jobs.c.owner == owner)
    return set(connection.scalars(select(jobs.c.id).where(*wanted)))


def renew(connection: Connection, owner: str, lease: datetime) -> None:
    wanted = (jobs.c.state == "running", jobs.c.owner == owner)
    connection.execute(update_rows(jobs).where(*wanted).values(lease=lease))


def leases_of_others(connection: Connection, owner: str) -> set[tuple[str, datetime]]:
    """Ids of the jobs that other servers run, each with its lease."""
    wanted = (jobs.c.state == "running", jobs.c.owner != owner, jobs.c.lease.is_not(None))
    rows = connection.execute(select(jobs.c.id, jobs.c.lease).where(*wanted))
    return {(row.id, row.lease) for row in rows}


def page(
    connection: Connection,
    before: str | None,
    limit: int,
    task: str | None,
    state: JobState | None,
    prefix: str | None,
) -> list[Job]:
    """The newest `limit` jobs older than `before`, of one task, in one state, of a prefix."""
    wanted: list[ColumnElement[bool]] = []
    if before is not None:
        wanted.append(jobs.c.id < before)
    if task is not None:
        wanted.append(jobs.c.task == task)
    if state is not None:
        wanted.append(jobs.c.state == state)
    if prefix is not None:
        wanted += begins_with(jobs.c.task, prefix)
    statement = select(jobs).where(*wanted).order_by(jobs.c.id.desc()).limit(limit)
    return [_job(row) for row in connection.execute(statement)]


def counts(connection: Connection) -> dict[str, int]:
    """How many jobs are in each state; a state without jobs is left out."""
    statement = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    return {row[0]: row[1] for row in connection.execute(statement)}


def drop_old(connection: Connection, keep: int) -> None:
    """Forget ended jobs except the `keep` newest."""
    newest = select(jobs.c.id).where(~_is_open()).order_by(jobs.c.id.desc())
    last = connection.scalar(newest.offset(keep).limit(1))
    if last is not None:
        old = select(jobs.c.id).where(~_is_open(), jobs.c.id <= last)
        connection.execute(delete(orders).where(orders.c.job_id.in_(old)))
        connection.execute(delete(jobs).where(~_is_open(), jobs.c.id <= last))


def _is_open() -> ColumnElement[bool]:
    return jobs.c.state.in_(OPEN)


def _one(connection: Connection, statement: Select[Any], job_id: str) -> Job:
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise UnknownJob(job_id)
    return _job(row)


def _job(row: Row[Any]) -> Job:
    return Job(**row._mapping)


def batch_of(jobs_in_line: Sequence[Job], limit: int) -> list[Job]:
    """Which of the queued jobs, oldest first, are to be fitted together next.

    Those that an orderly stop or a crash of the server left together, so that their checkpoint
    fits; else one alone that brought its batch down before; else everyone who waits, up to `limit`.
    """
    if not jobs_in_line:
        return []
    first = jobs_in_line[0]
    if first.batch is not None:
        return [job for job in jobs_in_line if job.batch == first.batch]
    if first.attempts:
        return [first]
    return [job for job in jobs_in_line if job.batch is None and not job.attempts][:limit]
