"""Former versions of tasks: every statement on them, each inside of the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, select

from polyhead.server.tasks.errors import UnknownGeneration, UnknownTask
from polyhead.server.tasks.models import tasks, versions
from polyhead.server.tasks.store import Record, drop_unused, record_of, row_of
from polyhead.server.tasks.task import Task

COLUMNS = tuple(column.name for column in tasks.columns)
Ending = Literal["replaced", "deleted"]


@dataclass(frozen=True)
class Version:
    """What a task once was. ended_at: when it was replaced or deleted; None is the newest."""

    task: Task
    ended_at: datetime | None = None
    ended: Ending | None = None


def keep(connection: Connection, record: Record, ended: Ending, most: int) -> None:
    """Remember a version that ends now. Of those of a task that ended like it the `most` newest
    stay, and the one that was deleted last in any case."""
    row = {**row_of(record), "ended_at": datetime.now(UTC), "ended": ended}
    connection.execute(insert(versions), row)
    wanted = (versions.c.id == record.task.id, versions.c.ended == ended)
    spare = max(most, 1) if ended == "deleted" else most
    newest = select(versions.c.number).where(*wanted).order_by(versions.c.number.desc())
    last = connection.scalar(newest.offset(spare).limit(1))
    if last is not None:
        _drop(connection, *wanted, versions.c.number <= last)


def of_task(connection: Connection, task_id: str) -> list[Version]:
    """Former versions of a task, the newest first."""
    rows = connection.execute(
        select(versions).where(versions.c.id == task_id).order_by(versions.c.number.desc())
    )
    return [Version(_record(row).task, row.ended_at, row.ended) for row in rows]


def find(connection: Connection, task_id: str, generation: str) -> Record:
    """The newest version that was at `generation`. Raises `UnknownGeneration`."""
    wanted = (versions.c.id == task_id, versions.c.generation == generation)
    statement = select(versions).where(*wanted).order_by(versions.c.number.desc()).limit(1)
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise UnknownGeneration(task_id, generation)
    return _record(row)


def take_deleted(connection: Connection, task_id: str, since: datetime) -> Record:
    """The version that was deleted last, which is in the history no more.

    Raises `UnknownTask` where none was deleted after `since`.
    """
    wanted = (versions.c.id == task_id, versions.c.ended == "deleted", versions.c.ended_at >= since)
    statement = select(versions).where(*wanted).order_by(versions.c.number.desc()).limit(1)
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise UnknownTask(task_id)
    connection.execute(delete(versions).where(versions.c.number == row.number))
    return _record(row)


def drop_deleted(connection: Connection, before: datetime) -> list[str]:
    """Forget the tasks that were deleted before then, with all that they had been.

    Returns their ids. A task that has come under the same id since keeps its own history.
    """
    last = (
        select(versions.c.id, func.max(versions.c.number))
        .where(versions.c.ended == "deleted", versions.c.ended_at < before)
        .group_by(versions.c.id)
    )
    found = [(row[0], row[1]) for row in connection.execute(last)]
    for task_id, number in found:
        _drop(connection, versions.c.id == task_id, versions.c.number <= number)
    return [task_id for task_id, _ in found]


def drop_task(connection: Connection, task_id: str) -> None:
    """Forget everything that a task was."""
    _drop(connection, versions.c.id == task_id)


def _drop(connection: Connection, *wanted: ColumnElement[bool]) -> None:
    contents: Sequence[str] = connection.scalars(select(versions.c.content).where(*wanted)).all()
    connection.execute(delete(versions).where(*wanted))
    for content in set(contents):
        drop_unused(connection, content)


def _record(row: Row[Any]) -> Record:
    return record_of({name: row._mapping[name] for name in COLUMNS})
