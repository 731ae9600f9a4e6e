"""alembic's environment. The connection comes from the caller (`database.migrate`), inside its transaction and lock,
so that a migration is there whole or not at all, on SQLite too."""

from __future__ import annotations

from alembic import context

from tunnel.core.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,  # SQLite alters tables by copying them
)
with context.begin_transaction():
    context.run_migrations()
