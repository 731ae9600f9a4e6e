"""What is asked of the store, as plain functions of a connection inside a transaction. All SQL stands here, but
for that of names which agents claim (claiming.py).

Used by a running core through `Store.query` and by the commands directly. Functions that change what a core must
notice bump the revision in the same transaction. Times are seconds since 1970; names and ids are exact.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tunnel.core.quotas import LIMIT_NAMES, Limits, Use
from tunnel.core.tables import accounts, batches, claims, revision, tokens, tunnels, usage
from tunnel.core.tokens import SHOWN, hash_token, make_token
from tunnel.errors import TunnelError

#: ids asked for in one statement (PostgreSQL takes 65,535 parameters, SQLite 32,766)
_CHUNK = 1000
#: any number; who changes claims on PostgreSQL holds the advisory lock of this name
_CLAIM_LOCK = 0x636C61696D
#: seconds after which PostgreSQL gives up a transaction with it whose core stands still
_STUCK = 10
#: letters and digits of ids, without those that are read wrongly
_ID_DIGITS = "23456789abcdefghjkmnpqrstuvwxyz"
#: seconds after which the last batch number of a core process that is gone is forgotten
_BATCH_LIFE = 30 * 86400.0


class RecordError(TunnelError):
    """Asked for something that is not there, or is there already: one line for the administrator."""


@dataclass(frozen=True, slots=True)
class AccountRecord:
    id: str
    name: str
    created_at: float
    is_disabled: bool
    limits: Limits


@dataclass(frozen=True, slots=True)
class TokenRecord:
    id: str
    account_id: str
    name: str
    prefix: str
    hash: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Accounts with their tokens, as of a revision."""

    revision: int
    accounts: dict[str, AccountRecord]
    tokens: dict[str, TokenRecord]


def _account(row: sa.Row[Any]) -> AccountRecord:
    values = row._mapping
    limits = Limits(**{name: values[name] for name in LIMIT_NAMES})
    return AccountRecord(values["id"], values["name"], values["created_at"], bool(values["disabled"]), limits)


def _token(row: sa.Row[Any]) -> TokenRecord:
    values = row._mapping
    return TokenRecord(**{name: values[name] for name in TokenRecord.__slots__})


def upsert(conn: sa.Connection, table: sa.Table) -> Any:
    """INSERT … ON CONFLICT: both databases have it, each in its own class."""
    return postgresql.insert(table) if conn.dialect.name == "postgresql" else sqlite.insert(table)


def chunks(ids: Collection[str]) -> list[list[str]]:
    ordered = sorted(ids)
    return [ordered[i : i + _CHUNK] for i in range(0, len(ordered), _CHUNK)]


# Revision ----------------------------------------------------------------------------------------------------------


def read_revision(conn: sa.Connection) -> int:
    return int(conn.execute(sa.select(revision.c.value)).scalar_one())


def bump_revision(conn: sa.Connection) -> None:
    """Also a lock: administrative writes come one after the other."""
    conn.execute(sa.update(revision).values(value=revision.c.value + 1))


def lock_claims(conn: sa.Connection) -> None:
    """Names are claimed and given up one after the other: as SQLite's transactions are, PostgreSQL's by a lock until
    they end. Two that change the same rows in another order would lock each other out. After `bump_revision`, if both.
    """
    if conn.dialect.name == "postgresql":
        conn.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{_STUCK}s'")
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIM_LOCK)))


# Accounts ----------------------------------------------------------------------------------------------------------


def create_account(conn: sa.Connection, name: str, now: float) -> AccountRecord:
    """A new account without limits. Its id is the name and six random characters: readable as a metric's label, and
    not inherited by an account that gets the name later. Raises RecordError if the name is taken."""
    bump_revision(conn)
    if find_account(conn, name) is not None:
        raise RecordError(f"account {name} exists already")
    id = f"{name}-" + "".join(secrets.choice(_ID_DIGITS) for _ in range(6))
    conn.execute(sa.insert(accounts).values(id=id, name=name, created_at=now, disabled=False))
    return AccountRecord(id, name, now, False, Limits())


def count_accounts(conn: sa.Connection) -> int:
    return int(conn.execute(sa.select(sa.func.count()).select_from(accounts)).scalar_one())


def has_been_used(conn: sa.Connection) -> bool:
    """Whether an agent has ever come in, by a token or, as use tells, by a JWT."""
    signs = (sa.select(tokens.c.id).where(tokens.c.last_used_at.is_not(None)), sa.select(usage.c.account_id))
    return any(conn.execute(sign.limit(1)).first() is not None for sign in signs)


def list_accounts(conn: sa.Connection) -> list[AccountRecord]:
    return [_account(row) for row in conn.execute(sa.select(accounts).order_by(accounts.c.name))]


def find_account(conn: sa.Connection, name: str) -> AccountRecord | None:
    """By name, or else by id."""
    which = sa.or_(accounts.c.name == name, accounts.c.id == name)
    order = sa.case((accounts.c.name == name, 0), else_=1)
    row = conn.execute(sa.select(accounts).where(which).order_by(order)).first()
    return _account(row) if row is not None else None


def get_account(conn: sa.Connection, name: str) -> AccountRecord:
    """By name or id; raises RecordError."""
    account = find_account(conn, name)
    if account is None:
        raise RecordError(f"there is no account {name}")
    return account


def change_account(conn: sa.Connection, account_id: str, values: Mapping[str, object]) -> None:
    """values: columns of the table: limits (None removes) or "disabled"."""
    bump_revision(conn)
    conn.execute(sa.update(accounts).where(accounts.c.id == account_id).values(**values))


def delete_account(conn: sa.Connection, account_id: str) -> None:
    """With its tokens, names and usage."""
    bump_revision(conn)
    lock_claims(conn)
    conn.execute(sa.delete(accounts).where(accounts.c.id == account_id))


def read_snapshot(conn: sa.Connection, ids: Collection[str]) -> Snapshot:
    """The accounts of these ids that exist, and all their tokens."""
    snapshot = Snapshot(read_revision(conn), {}, {})  # the revision first: it is never newer than what follows
    for chunk in chunks(ids):
        for row in conn.execute(sa.select(accounts).where(accounts.c.id.in_(chunk))):
            account = _account(row)
            snapshot.accounts[account.id] = account
        for row in conn.execute(sa.select(tokens).where(tokens.c.account_id.in_(chunk))):
            token = _token(row)
            snapshot.tokens[token.id] = token
    return snapshot


# Tokens ------------------------------------------------------------------------------------------------------------


def create_token(
    conn: sa.Connection, account_id: str, name: str, now: float, expires_at: float | None
) -> tuple[TokenRecord, str]:
    """The record, and the token itself, which is kept nowhere."""
    bump_revision(conn)
    token = make_token()
    id = "tok_" + "".join(secrets.choice(_ID_DIGITS) for _ in range(10))
    record = TokenRecord(id, account_id, name, token[:SHOWN], hash_token(token), now, expires_at, None, None)
    conn.execute(sa.insert(tokens).values({field: getattr(record, field) for field in TokenRecord.__slots__}))
    return record, token


def find_token(conn: sa.Connection, hash: str) -> tuple[int, TokenRecord | None, AccountRecord | None]:
    """(revision, token, its account) by the token's hash."""
    at = read_revision(conn)
    row = conn.execute(sa.select(tokens).where(tokens.c.hash == hash)).first()
    if row is None:
        return at, None, None
    token = _token(row)
    return at, token, find_account(conn, token.account_id)


def list_tokens(conn: sa.Connection, account_id: str | None = None) -> list[tuple[TokenRecord, str]]:
    """(token, its account's name), oldest first."""
    query = (
        sa.select(tokens, accounts.c.name.label("account")).join(accounts).order_by(tokens.c.created_at, tokens.c.id)
    )
    if account_id is not None:
        query = query.where(tokens.c.account_id == account_id)
    return [(_token(row), row._mapping["account"]) for row in conn.execute(query)]


def revoke_token(conn: sa.Connection, which: str, now: float) -> TokenRecord:
    """which: an id or what begins it, the shown beginning of a token, or a token. Raises RecordError."""
    bump_revision(conn)
    match = sa.or_(
        tokens.c.id.startswith(which, autoescape=True),
        tokens.c.prefix.startswith(which, autoescape=True),
        tokens.c.hash == hash_token(which),
    )
    found = [_token(row) for row in conn.execute(sa.select(tokens).where(match).limit(10))]
    if not found or not which:
        raise RecordError("there is no such token; `token list` shows them")
    if len(found) > 1:
        raise RecordError("several tokens begin so: " + ", ".join(token.id for token in found))
    if found[0].revoked_at is not None:
        raise RecordError(f"token {found[0].id} is revoked already")
    conn.execute(sa.update(tokens).where(tokens.c.id == found[0].id).values(revoked_at=now))
    return found[0]


# Names -------------------------------------------------------------------------------------------------------------


def reserve_name(conn: sa.Connection, name: str, account_id: str, now: float) -> str:
    """Also ends another account's claim to it, and returns that one's name, or "". Raises RecordError if it is reserved
    already."""
    bump_revision(conn)
    lock_claims(conn)
    query = sa.select(accounts.c.name).join(tunnels).where(tunnels.c.name == name)
    owner = conn.execute(query).scalar()
    if owner is not None:
        raise RecordError(f"{name} is reserved already, by account {owner}")
    query = sa.select(accounts.c.name).join(claims).where(claims.c.name == name, claims.c.account_id != account_id)
    loser = conn.execute(query).scalar()
    conn.execute(sa.delete(claims).where(claims.c.name == name))
    conn.execute(sa.insert(tunnels).values(name=name, account_id=account_id, created_at=now))
    return loser or ""


def unreserve_name(conn: sa.Connection, name: str) -> AccountRecord:
    """Returns whose it was: who may be serving it (claiming.keep_claim). Raises RecordError if it is not reserved."""
    bump_revision(conn)
    gone = sa.delete(tunnels).where(tunnels.c.name == name).returning(tunnels.c.account_id)
    account_id = conn.execute(gone).scalar()
    if account_id is None:
        raise RecordError(f"{name} is not reserved")
    return _account(conn.execute(sa.select(accounts).where(accounts.c.id == account_id)).one())


def list_names(conn: sa.Connection, account_id: str | None = None) -> list[dict[str, Any]]:
    """Reserved names and those in use or held: name, account, reserved, since (seconds since 1970)."""
    rows: list[dict[str, Any]] = []
    for table, at, is_reserved in ((tunnels, tunnels.c.created_at, True), (claims, claims.c.seen_at, False)):
        query = sa.select(table.c.name, accounts.c.name.label("account"), at.label("at")).join_from(table, accounts)
        if account_id is not None:
            query = query.where(table.c.account_id == account_id)
        rows += [{**row._mapping, "reserved": is_reserved} for row in conn.execute(query)]
    return sorted(rows, key=lambda row: (row["name"], not row["reserved"]))


def is_reserved(conn: sa.Connection, name: str) -> bool:
    return conn.execute(sa.select(tunnels.c.account_id).where(tunnels.c.name == name)).first() is not None


# Usage -------------------------------------------------------------------------------------------------------------


def add_usage(
    conn: sa.Connection,
    writer: str,
    number: int,
    use: Mapping[tuple[str, str], Use],
    used_tokens: Mapping[str, float],
    now: float,
) -> dict[tuple[str, str], Use]:
    """Add a batch of use by (account id, period) and return what the store then holds for these.

    A batch that this writer has written before, with the same number, is not added again. Accounts that were deleted
    meanwhile are passed over. used_tokens: token id → when it was last used.
    """
    ids = {account_id for account_id, _ in use}
    known: set[str] = set()
    for chunk in chunks(ids):
        known.update(conn.execute(sa.select(accounts.c.id).where(accounts.c.id.in_(chunk))).scalars())
    if _is_new_batch(conn, writer, number, now):
        rows = [
            {
                "account_id": id,
                "period": period,
                "requests": u.requests,
                "bytes_in": u.bytes_in,
                "bytes_out": u.bytes_out,
            }
            for (id, period), u in sorted(use.items())  # one order for all cores: no deadlock
            if id in known
        ]
        if rows:
            insert = upsert(conn, usage)
            columns = ("requests", "bytes_in", "bytes_out")
            add = {name: usage.c[name] + insert.excluded[name] for name in columns}
            conn.execute(insert.on_conflict_do_update(index_elements=["account_id", "period"], set_=add), rows)
    for token_id, at in sorted(used_tokens.items()):
        conn.execute(sa.update(tokens).where(tokens.c.id == token_id).values(last_used_at=at))
    stored = read_usage_of(conn, known, {period for _, period in use})
    return {key: stored[key] for key in use if key in stored}


def _is_new_batch(conn: sa.Connection, writer: str, number: int, now: float) -> bool:
    insert = upsert(conn, batches).values(writer=writer, number=number, written_at=now)
    changed = conn.execute(
        insert.on_conflict_do_update(
            index_elements=["writer"],
            set_={"number": number, "written_at": now},
            where=batches.c.number < number,
        ).returning(batches.c.number)
    ).first()
    if number == 1:
        conn.execute(sa.delete(batches).where(batches.c.written_at < now - _BATCH_LIFE))
    return changed is not None


def read_usage_of(conn: sa.Connection, ids: Collection[str], periods: Collection[str]) -> dict[tuple[str, str], Use]:
    found: dict[tuple[str, str], Use] = {}
    for chunk in chunks(ids):
        query = sa.select(usage).where(usage.c.account_id.in_(chunk), usage.c.period.in_(sorted(periods)))
        for row in conn.execute(query):
            values = row._mapping
            found[values["account_id"], values["period"]] = Use(
                values["requests"], values["bytes_in"], values["bytes_out"]
            )
    return found


def list_usage(conn: sa.Connection, period: str, account_id: str | None) -> Sequence[tuple[AccountRecord, Use]]:
    """Every account's use of a month, or one account's, zeros included."""
    chosen = [account for account in list_accounts(conn) if account_id in (None, account.id)]
    stored = read_usage_of(conn, [account.id for account in chosen], [period])
    return [(account, stored.get((account.id, period), Use())) for account in chosen]
