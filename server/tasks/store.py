"""Rows of the registry: every statement it runs, each inside of a transaction of the caller's."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, exists, func, insert, select
from sqlalchemy import update as update_rows
from sqlalchemy.exc import IntegrityError

from polyhead.server.tasks.contents import StoredContent
from polyhead.server.tasks.errors import StaleGeneration, TaskExists, UnknownTask
from polyhead.server.tasks.models import contents, info, labels, seeds, sketches, tasks, versions
from polyhead.server.tasks.task import JsonScalar, Task


@dataclass(frozen=True)
class Record:
    """A task's row: the task and the fingerprint of its content."""

    task: Task
    content: str


def find(connection: Connection, task_id: str) -> Record:
    """Raises `UnknownTask`."""
    return _one(connection, select(tasks).where(tasks.c.id == task_id), task_id)


def claim(connection: Connection, task_id: str, if_match: str | None) -> Record:
    """The row to change, held against other writers until the transaction ends.

    Raises `UnknownTask`, or `StaleGeneration` when it is not at generation `if_match`.
    """
    statement = select(tasks).where(tasks.c.id == task_id).with_for_update()
    record = _one(connection, statement, task_id)
    if if_match is not None and record.task.generation != if_match:
        raise StaleGeneration(task_id, found=record.task.generation, expected=if_match)
    return record


def exists_task(connection: Connection, task_id: str) -> bool:
    return bool(connection.scalar(select(exists().where(tasks.c.id == task_id))))


def add(connection: Connection, record: Record) -> None:
    """Its content must be there. Raises `TaskExists`; the transaction is void then."""
    try:
        connection.execute(insert(tasks), row_of(record))
    except IntegrityError as exc:
        raise TaskExists(record.task.id) from exc
    _put_labels(connection, record.task)


def update(connection: Connection, record: Record) -> None:
    """Write a row that was claimed."""
    task = record.task
    connection.execute(update_rows(tasks).where(tasks.c.id == task.id), row_of(record))
    connection.execute(delete(labels).where(labels.c.task_id == task.id))
    _put_labels(connection, task)


def remove(connection: Connection, record: Record) -> None:
    """Its content stays, until `drop_unused`."""
    connection.execute(delete(tasks).where(tasks.c.id == record.task.id))


def put_content(connection: Connection, content: StoredContent) -> None:
    """Equal contents are stored once, however many tasks have them."""
    key = content.fingerprint
    if connection.scalar(select(contents.c.fingerprint).where(contents.c.fingerprint == key)):
        return
    connection.execute(insert(contents), {"fingerprint": key, "data": content.data})
    if content.sketch is not None:
        connection.execute(insert(sketches), {"fingerprint": key, "sketch": content.sketch})


def has_content(connection: Connection, fingerprint: str) -> bool:
    return bool(connection.scalar(select(exists().where(contents.c.fingerprint == fingerprint))))


def drop_unused(connection: Connection, fingerprint: str) -> None:
    """Delete a content that no task has any more, nor ever had as far as it is remembered."""
    for table in (tasks, versions):
        if connection.scalar(select(exists().where(table.c.content == fingerprint))):
            return
    connection.execute(delete(sketches).where(sketches.c.fingerprint == fingerprint))
    connection.execute(delete(contents).where(contents.c.fingerprint == fingerprint))


def content_data(connection: Connection, fingerprint: str) -> bytes:
    statement = select(contents.c.data).where(contents.c.fingerprint == fingerprint)
    data: bytes = connection.execute(statement).scalar_one()
    return data


def private_contents(connection: Connection) -> set[str]:
    """Fingerprints of the private adapters of all tasks, and of what they were."""
    found: set[str] = set()
    for table in (tasks, versions):
        found.update(connection.scalars(select(table.c.content).where(table.c.kind == "private")))
    return found


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(tasks)).scalar_one()


def page(
    connection: Connection,
    after: str | None,
    limit: int,
    metadata: Mapping[str, JsonScalar],
    prefix: str | None,
) -> list[Task]:
    """The first `limit` tasks with these metadata and this prefix whose id comes after `after`."""
    wanted: list[ColumnElement[bool]] = [
        exists().where(labels.c.task_id == tasks.c.id, labels.c.label == _label(key, value))
        for key, value in metadata.items()
    ]
    if after is not None:
        wanted.append(tasks.c.id > after)
    if prefix is not None:
        wanted += begins_with(tasks.c.id, prefix)
    statement = select(tasks).where(*wanted).order_by(tasks.c.id).limit(limit)
    return [record_of(dict(row._mapping)).task for row in connection.execute(statement)]


def begins_with(column: ColumnElement[str], prefix: str) -> list[ColumnElement[bool]]:
    """That ids in `column` begin with `prefix`, as a range, which an index answers."""
    # No id holds a character as high as DEL, so this is the end of the prefix's range.
    return [column >= prefix, column < prefix + "\x7f"]


def all_tasks(connection: Connection) -> list[Task]:
    return [
        record_of(dict(row._mapping)).task
        for row in connection.execute(select(tasks).order_by(tasks.c.id))
    ]


def all_records(connection: Connection) -> Iterator[Record]:
    """Every task in the order of the ids, a few at a time in memory."""
    statement = select(tasks).order_by(tasks.c.id).execution_options(yield_per=500)
    for row in connection.execute(statement):
        yield record_of(dict(row._mapping))


def all_sketches(
    connection: Connection, prefix: str | None = None
) -> tuple[list[str], list[bytes]]:
    """Fingerprints of all routings, or of a prefix's, and their sketches, in the same order."""
    holding = select(tasks.c.content)  # not what tasks only were
    if prefix is not None:
        holding = holding.where(*begins_with(tasks.c.id, prefix))
    statement = select(sketches.c.fingerprint, sketches.c.sketch)
    statement = statement.where(sketches.c.fingerprint.in_(holding))
    rows = connection.execute(statement).all()
    return [row[0] for row in rows], [row[1] for row in rows]


def holders(
    connection: Connection, fingerprints: Sequence[str], prefix: str | None = None
) -> list[tuple[str, str]]:
    """Id and content of every task, or of a prefix's, that has one of these contents."""
    statement = select(tasks.c.id, tasks.c.content).where(tasks.c.content.in_(fingerprints))
    if prefix is not None:
        statement = statement.where(*begins_with(tasks.c.id, prefix))
    return [(row[0], row[1]) for row in connection.execute(statement)]


def unseeded(connection: Connection, task_ids: Sequence[str]) -> list[str]:
    """Those of `task_ids` that are free and were never registered from the inventory."""
    known = set(connection.scalars(select(seeds.c.task_id)))
    asked = [task_id for task_id in task_ids if task_id not in known]
    taken = set(connection.scalars(select(tasks.c.id).where(tasks.c.id.in_(asked))))
    return [task_id for task_id in asked if task_id not in taken]


def mark_seeded(connection: Connection, task_id: str) -> None:
    connection.execute(insert(seeds), {"task_id": task_id})


def read_info(connection: Connection, key: str) -> str | None:
    return connection.scalar(select(info.c.value).where(info.c.key == key))


def write_info(connection: Connection, key: str, value: str) -> None:
    connection.execute(delete(info).where(info.c.key == key))
    connection.execute(insert(info), {"key": key, "value": value})


def clear(connection: Connection) -> None:
    """Delete every task, and what they were."""
    for table in (labels, tasks, versions, sketches, contents, seeds):
        connection.execute(delete(table))


def _one(connection: Connection, statement: Select[Any], task_id: str) -> Record:
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise UnknownTask(task_id)
    return record_of(dict(row._mapping))


def record_of(row: Mapping[str, Any]) -> Record:
    """From the columns of `tasks`."""
    values = dict(row)
    content = values.pop("content")
    return Record(Task(**values), content)


def row_of(record: Record) -> dict[str, Any]:
    """The columns of `tasks`."""
    return {**asdict(record.task), "content": record.content}


def _put_labels(connection: Connection, task: Task) -> None:
    rows = [{"task_id": task.id, "label": _label(*item)} for item in task.metadata.items()]
    if rows:
        connection.execute(insert(labels), rows)


def _label(key: str, value: JsonScalar) -> str:
    """A digest, because a database's index takes no entries of any length."""
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(json.dumps([key, text]).encode()).hexdigest()
