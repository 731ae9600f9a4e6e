"""The store's tables. `migrations/` makes them; a test holds that both say the same.

Times are seconds since 1970 (UTC) as doubles, so that both databases agree on them without a word about time zones.
A limit that is NULL does not exist; of agents, names and ports at a time the core's own holds then.
"""

from __future__ import annotations

import sqlalchemy as sa

#: every schema that ever was, oldest first; the last is the one this code works with
REVISIONS = ("0001", "0002")

metadata = sa.MetaData()


def _account_column(*, primary_key: bool = False) -> sa.Column[str]:
    reference = sa.ForeignKey("accounts.id", ondelete="CASCADE")
    return sa.Column("account_id", sa.String(96), reference, nullable=False, primary_key=primary_key)


accounts = sa.Table(
    "accounts",
    metadata,
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
    sa.Column("max_names", sa.Integer()),
    sa.Column("max_ports", sa.Integer()),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    _account_column(),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),  # SHA-256, lower-case hex
    sa.Column("prefix", sa.String(16), nullable=False),  # what is shown of it
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Column("expires_at", sa.Double()),
    sa.Column("revoked_at", sa.Double()),
    sa.Column("last_used_at", sa.Double()),
    sa.Index("tokens_account", "account_id"),
)

#: names reserved by an administrator: a subdomain or a full host name, lower case
tunnels = sa.Table(
    "tunnels",
    metadata,
    sa.Column("name", sa.String(253), primary_key=True),
    _account_column(),
    sa.Column("created_at", sa.Double(), nullable=False),
    sa.Index("tunnels_account", "account_id"),
)

#: unreserved names in use, or held for their account after its last link. `seen_at` is refreshed while the name is in
#: use and set once more when it is released, so a core that was killed leaves no name held for ever.
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("name", sa.String(253), primary_key=True),
    _account_column(),
    sa.Column("seen_at", sa.Double(), nullable=False),
    sa.Index("claims_account", "account_id"),
)

usage = sa.Table(
    "usage",
    metadata,
    _account_column(primary_key=True),
    sa.Column("period", sa.String(7), primary_key=True),  # "2026-11", UTC
    sa.Column("requests", sa.BigInteger(), nullable=False),
    sa.Column("bytes_in", sa.BigInteger(), nullable=False),
    sa.Column("bytes_out", sa.BigInteger(), nullable=False),
)

#: the number of the last batch of usage that each core process has written, so that a batch whose commit was lost on
#: the way back is not added twice
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("writer", sa.String(32), primary_key=True),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("written_at", sa.Double(), nullable=False),
)

#: one row; every administrative write adds 1, so that a running core notices changes with one cheap look
revision = sa.Table(
    "revision",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("value", sa.BigInteger(), nullable=False),
)
