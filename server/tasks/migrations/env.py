"""Run by Alembic: migrates over the connection that `polyhead.server.tasks.sql` hands in."""

from alembic import context

from polyhead.server.tasks.models import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
