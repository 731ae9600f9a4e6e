"""Limits of an account's names and TCP ports. Never edited again: a change is a new file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("accounts", sa.Column("max_names", sa.Integer()))
    op.add_column("accounts", sa.Column("max_ports", sa.Integer()))


def downgrade() -> None:
    op.drop_column("accounts", "max_ports")
    op.drop_column("accounts", "max_names")
