"""The registry's tables. The migrations build them; a test holds the two together."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMING)

# Prefixes and cursors compare ids byte by byte, which PostgreSQL does under this collation only.
TaskId = String(128).with_variant(String(128, collation="C"), "postgresql")
Digest = String(64)
Sequence = BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC, also where the database keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC)


contents = Table(
    "contents",
    metadata,
    Column("fingerprint", Digest, primary_key=True),
    Column("data", LargeBinary, nullable=False),  # safetensors; empty where a blob holds it
)

# Apart from the contents so that a scan over all tasks reads 0.5 kB of each and not 54.
sketches = Table(
    "sketches",
    metadata,
    Column("fingerprint", Digest, ForeignKey("contents.fingerprint"), primary_key=True),
    Column("sketch", LargeBinary, nullable=False),  # [SKETCH_WIDTH] float32, little-endian
)


def _task_columns() -> list[Column[Any]]:
    """What describes one version of a task, beside its id."""
    return [
        Column("generation", Digest, nullable=False),
        Column("kind", String(16), nullable=False),
        Column("granularity", String(16)),
        Column("routing_kind", String(16)),
        Column("template", Text),
        Column("defaults", JSON, nullable=False),
        Column("metadata", JSON, nullable=False),
        Column("provenance", JSON, nullable=False),
        Column("created_at", UtcDateTime, nullable=False),
        Column("updated_at", UtcDateTime, nullable=False),
        Column("content", Digest, ForeignKey("contents.fingerprint"), nullable=False, index=True),
    ]


tasks = Table("tasks", metadata, Column("id", TaskId, primary_key=True), *_task_columns())

# What tasks were before: the older versions of those that are there, and the deleted ones.
versions = Table(
    "versions",
    metadata,
    Column("number", Sequence, primary_key=True),
    Column("id", TaskId, nullable=False),  # no foreign key: the task may be gone
    *_task_columns(),
    Column("ended_at", UtcDateTime, nullable=False),
    Column("ended", String(16), nullable=False),  # replaced or deleted
    Index("ix_versions_id", "id", "number"),
    sqlite_autoincrement=True,
)

# Every change, in the order of the commits: who may have done what, and what to forget elsewhere.
audit = Table(
    "audit",
    metadata,
    Column("number", Sequence, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("task", TaskId, nullable=False),
    Column("action", String(16), nullable=False),
    Column("before", Digest),
    Column("after", Digest),
    Column("actor", String(128)),
    Index("ix_audit_task", "task", "number"),
    sqlite_autoincrement=True,
)

# One row per metadata entry: a filter is an index look-up, and the same SQL on every database.
labels = Table(
    "labels",
    metadata,
    Column("task_id", TaskId, ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    Column("label", Digest, primary_key=True),
    Index("ix_labels_label", "label", "task_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", TaskId, primary_key=True),
    Column("task", TaskId, nullable=False),  # no foreign key: it may be yet to be, or gone
    Column("state", String(16), nullable=False),
    Column("base", Digest),
    Column("batch", String(64)),
    Column("attempts", Integer, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("owner", String(64)),
    Column("lease", UtcDateTime),
    Index("ix_jobs_state", "state", "id"),
    Index("ix_jobs_task", "task", "id"),
)

# Apart from the jobs so that looking at them does not read hundreds of examples of each.
orders = Table(
    "orders",
    metadata,
    Column("job_id", TaskId, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("data", JSON, nullable=False),
)

# Which of the inventory's tasks were registered once: a deleted one must not come back.
seeds = Table("seeds", metadata, Column("task_id", TaskId, primary_key=True))

info = Table(
    "info",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)
