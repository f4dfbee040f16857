"""Fitting jobs and what each was asked to do."""

import sqlalchemy as sa
from alembic import op

from polyhead.server.tasks.migrations.shapes import moment, task_id

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", task_id, nullable=False),
        sa.Column("task", task_id, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("base", sa.String(64)),
        sa.Column("batch", sa.String(64)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.Text),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("started_at", moment),
        sa.Column("ended_at", moment),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "id"])
    op.create_index("ix_jobs_task", "jobs", ["task", "id"])
    op.create_table(
        "orders",
        sa.Column("job_id", task_id, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_orders"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_orders_job_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    op.drop_table("orders")
    op.drop_table("jobs")
