"""Former versions of tasks, the log of changes, and who runs a job."""

import sqlalchemy as sa
from alembic import op

from polyhead.server.tasks.migrations.shapes import digest, moment, sequence, task_id

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    _create_versions()
    op.create_table(
        "audit",
        sa.Column("number", sequence, nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("task", task_id, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("before", digest),
        sa.Column("after", digest),
        sa.Column("actor", sa.String(128)),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_task", "audit", ["task", "number"])
    op.add_column("jobs", sa.Column("owner", sa.String(64)))
    op.add_column("jobs", sa.Column("lease", moment))
    _rename_provenance("inventory", "seeded")


def downgrade() -> None:
    _rename_provenance("seeded", "inventory")
    op.drop_column("jobs", "lease")
    op.drop_column("jobs", "owner")
    op.drop_table("audit")
    op.drop_table("versions")


def _rename_provenance(old: str, new: str) -> None:
    """A task that came with the inventory says so in one word with the log of changes."""
    tasks = sa.table("tasks", sa.column("id", task_id), sa.column("provenance", sa.JSON))
    connection = op.get_bind()
    rows = connection.execute(sa.select(tasks.c.id, tasks.c.provenance)).all()
    changed = [(row[0], {**row[1], "how": new}) for row in rows if row[1].get("how") == old]
    for name, provenance in changed:
        connection.execute(sa.update(tasks).where(tasks.c.id == name).values(provenance=provenance))


def _create_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("number", sequence, nullable=False),
        sa.Column("id", task_id, nullable=False),
        sa.Column("generation", digest, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("granularity", sa.String(16)),
        sa.Column("routing_kind", sa.String(16)),
        sa.Column("template", sa.Text),
        sa.Column("defaults", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("provenance", sa.JSON, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.Column("content", digest, nullable=False),
        sa.Column("ended_at", moment, nullable=False),
        sa.Column("ended", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_versions"),
        sa.ForeignKeyConstraint(["content"], ["contents.fingerprint"], name="fk_versions_content"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_versions_id", "versions", ["id", "number"])
    op.create_index("ix_versions_content", "versions", ["content"])
