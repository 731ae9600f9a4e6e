"""The first schema: accounts, tokens, tunnels, claims, usage. Never edited again: a change is a new file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _account_column(*, primary_key: bool = False) -> sa.Column[str]:
    reference = sa.ForeignKey("accounts.id", ondelete="CASCADE")
    return sa.Column("account_id", sa.String(96), reference, nullable=False, primary_key=primary_key)


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(96), primary_key=True),
        sa.Column("name", sa.String(63), nullable=False, unique=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("max_connections", sa.Integer()),
        sa.Column("requests_per_second", sa.Double()),
        sa.Column("requests_burst", sa.Integer()),
        sa.Column("requests_per_month", sa.BigInteger()),
        sa.Column("bandwidth_bytes_per_second", sa.BigInteger()),
        sa.Column("bandwidth_bytes_per_month", sa.BigInteger()),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(32), primary_key=True),
        _account_column(),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("last_used_at", sa.Double()),
    )
    op.create_index("tokens_account", "tokens", ["account_id"])
    op.create_table(
        "tunnels",
        sa.Column("name", sa.String(253), primary_key=True),
        _account_column(),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("tunnels_account", "tunnels", ["account_id"])
    op.create_table(
        "claims",
        sa.Column("name", sa.String(253), primary_key=True),
        _account_column(),
        sa.Column("seen_at", sa.Double(), nullable=False),
    )
    op.create_index("claims_account", "claims", ["account_id"])
    op.create_table(
        "usage",
        _account_column(primary_key=True),
        sa.Column("period", sa.String(7), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("writer", sa.String(32), primary_key=True),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.Double(), nullable=False),
    )
    revisions = op.create_table(
        "revision",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(revisions, [{"id": 1, "value": 1}])


def downgrade() -> None:
    for name in ("revision", "batches", "usage", "claims", "tunnels", "tokens", "accounts"):
        op.drop_table(name)
