"""Tasks, their contents, and what is needed to find them."""

import sqlalchemy as sa
from alembic import op

from polyhead.server.tasks.migrations.shapes import digest, moment, task_id

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "contents",
        sa.Column("fingerprint", digest, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_contents"),
    )
    op.create_table(
        "sketches",
        sa.Column("fingerprint", digest, nullable=False),
        sa.Column("sketch", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_sketches"),
        sa.ForeignKeyConstraint(
            ["fingerprint"], ["contents.fingerprint"], name="fk_sketches_fingerprint"
        ),
    )
    _create_tasks()
    op.create_table(
        "labels",
        sa.Column("task_id", task_id, nullable=False),
        sa.Column("label", digest, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "label", name="pk_labels"),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name="fk_labels_task_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_labels_label", "labels", ["label", "task_id"])
    op.create_table(
        "seeds",
        sa.Column("task_id", task_id, nullable=False),
        sa.PrimaryKeyConstraint("task_id", name="pk_seeds"),
    )
    op.create_table(
        "info",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_info"),
    )


def downgrade() -> None:
    for table in ("info", "seeds", "labels", "tasks", "sketches", "contents"):
        op.drop_table(table)


def _create_tasks() -> None:
    op.create_table(
        "tasks",
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
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.ForeignKeyConstraint(["content"], ["contents.fingerprint"], name="fk_tasks_content"),
    )
    op.create_index("ix_tasks_content", "tasks", ["content"])
