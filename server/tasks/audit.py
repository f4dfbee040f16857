"""The log of changes: who did what to which task, in the order in which it was stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import ColumnElement, Connection, func, insert, select

from polyhead.server.tasks.models import audit
from polyhead.server.tasks.store import begins_with

Action = Literal[
    "created",
    "copied",
    "fitted",
    "seeded",
    "imported",
    "replaced",
    "edited",
    "rolled_back",
    "deleted",
    "restored",
    "purged",
]
CHANNEL = "polyhead_tasks"
"""On which PostgreSQL tells the other servers that the log has grown."""


@dataclass(frozen=True)
class Entry:
    """One change. before, after: the task's generations; None where there was or is none."""

    number: int
    at: datetime  # UTC
    task: str
    action: Action
    before: str | None
    after: str | None
    actor: str | None  # the id of the key; None where no key was needed


def note(
    connection: Connection,
    action: Action,
    task_id: str,
    before: str | None,
    after: str | None,
    actor: str | None,
) -> int:
    """Add an entry and wake who follows the log, both when the transaction is stored.

    Returns the entry's number.
    """
    row = {
        "at": datetime.now(UTC),
        "task": task_id,
        "action": action,
        "before": before,
        "after": after,
        "actor": actor,
    }
    number = connection.execute(insert(audit).returning(audit.c.number), row).scalar_one()
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_notify(CHANNEL, "")))
    return int(number)


def last_number(connection: Connection) -> int:
    """The number of the newest entry, 0 without any."""
    return connection.scalar(select(func.max(audit.c.number))) or 0


def since(connection: Connection, number: int, limit: int) -> Sequence[tuple[int, str]]:
    """Numbers and tasks of the first `limit` entries after `number`."""
    statement = select(audit.c.number, audit.c.task).where(audit.c.number > number)
    rows = connection.execute(statement.order_by(audit.c.number).limit(limit))
    return [(row[0], row[1]) for row in rows]


def page(
    connection: Connection, before: int | None, limit: int, task: str | None, prefix: str | None
) -> list[Entry]:
    """The newest `limit` entries older than `before`, of one task, of a prefix."""
    wanted: list[ColumnElement[bool]] = []
    if before is not None:
        wanted.append(audit.c.number < before)
    if task is not None:
        wanted.append(audit.c.task == task)
    if prefix is not None:
        wanted += begins_with(audit.c.task, prefix)
    statement = select(audit).where(*wanted).order_by(audit.c.number.desc()).limit(limit)
    return [Entry(**row._mapping) for row in connection.execute(statement)]
