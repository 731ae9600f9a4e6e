"""`python -m tunnel.core account|token|tunnel|usage|migrate …`: administration, straight on the store.

Each command is one transaction, so it works while cores run on the same store; they notice by the revision within a
second. What was asked for (a token, a list) goes to standard output, everything else to standard error; with `-json`
standard output holds one JSON document whatever the command. Exit code 1: it cannot be done; 2: it was asked wrongly.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tunnel.config.values import show_about, show_size
from tunnel.core import claiming, records
from tunnel.core.database import Database
from tunnel.core.domain import Domain
from tunnel.core.phrases import Limit, parse_commands, parse_expiry, parse_name, show_table, show_time
from tunnel.core.quotas import Limits, Use, month_of
from tunnel.core.records import AccountRecord, RecordError, TokenRecord
from tunnel.errors import TunnelError

#: names of commands, as the first word after the program's flags
COMMANDS = ("account", "token", "tunnel", "usage", "migrate")


def run_command(
    words: list[str], *, database_url: str, data_dir: Path, base_domain: str = "", name_hold: float = 600.0
) -> int:
    """Run one command and return the exit code. words: after the program's own flags, such as ["account", "list"].

    database_url, data_dir: as `database.Database` takes them. The store is migrated if need be; a file is made only by
    what begins a store, or each slip in its path would leave one that is empty.
    base_domain: of the core; <subdomain>.<base_domain> means the subdomain. name_hold: of the core, seconds.
    """
    options = parse_commands(words)
    if isinstance(options, int):
        return options
    options.domain, options.name_hold = Domain(base_domain), name_hold
    if options.command == "tunnel" and base_domain and getattr(options, "name", None):
        options.name = options.domain.name_of(options.name.lower().removesuffix("."))
    try:
        database = Database(database_url, data_dir)
        if not database.exists() and (options.command, options.action) not in _BEGINNINGS:
            flag = "-database-url" if database_url else "-data-dir"
            raise RecordError(f"there is no store at {database.url.database}; is {flag} that of the core?")
        try:
            before, now = database.open()
            if options.command == "migrate":
                answer, note = {"schema": now, "before": before or None, "store": database.name}, _migrated(before, now)
                text = ""
            else:
                action: Action = _ACTIONS[options.command, options.action]
                with database.transaction(write=(options.command, options.action) in _WRITES) as conn:
                    answer, text, note = action(conn, options)
        finally:
            database.close()
    except (TunnelError, ValueError) as exc:
        print(f"tunnel core: {exc}", file=sys.stderr)
        return 1
    if note:
        print(note, file=sys.stderr)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
    elif text:
        print(text)
    return 0


#: (for -json, for standard output, for standard error)
Answer = tuple[Any, str, str]
Action = Callable[[sa.Connection, Any], Answer]


def _migrated(before: str, now: str) -> str:
    if before == now:
        return f"the store is at schema {now}, the newest"
    return f"the store was migrated from schema {before} to {now}" if before else f"a new store was made, schema {now}"


# Accounts ----------------------------------------------------------------------------------------------------------


def _account_facts(account: AccountRecord, use: Use | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": account.id,
        "name": account.name,
        "created_at": show_time(account.created_at),
        "disabled": account.is_disabled,
        "limits": asdict(account.limits),
    }
    if use is not None:
        facts["usage"] = {"month": month_of(time.time())[0], **asdict(use)}
    return facts


def _show_limit(value: float | None, limit: Limit) -> str:
    if value is None:
        return f"none of its own (the core's {limit.default})" if limit.default else "none"
    return show_size(int(value)) if limit.is_size else f"{value:g}" if value < 1e6 else str(int(value))


def _limit_rows(limits: Limits) -> list[tuple[str, str]]:
    """All of them; where there is none, what holds instead."""
    return [(limit.title, _show_limit(getattr(limits, limit.column), limit)) for limit in Limit.ALL]


def _account_create(conn: sa.Connection, options: Any) -> Answer:
    account = records.create_account(conn, parse_name("account", options.name), time.time())
    note = f"account {account.name} was made (id {account.id}); next: token create {account.name}"
    return _account_facts(account), "", note


def _account_list(conn: sa.Connection, options: Any) -> Answer:
    found = records.list_usage(conn, month_of(time.time())[0], None)
    rows = [
        (
            account.name,
            account.id,
            show_time(account.created_at),
            "disabled" if account.is_disabled else "active",
            str(use.requests),
            show_about(use.bytes_in + use.bytes_out),
        )
        for account, use in found
    ]
    header = ("NAME", "ID", "CREATED", "STATE", "REQUESTS THIS MONTH", "BYTES THIS MONTH")
    return [_account_facts(account, use) for account, use in found], show_table(header, rows), ""


def _account_show(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.name)
    [(_, use)] = records.list_usage(conn, month_of(time.time())[0], account.id)
    tokens = [_token_facts(token, account.name) for token, _ in records.list_tokens(conn, account.id)]
    names = [_name_facts(row) for row in records.list_names(conn, account.id)]
    is_binary = show_size(account.limits.bandwidth_bytes_per_month or 0).endswith("iB")  # to be compared with it
    rows = [
        ("name", account.name),
        ("id", account.id),
        ("created", show_time(account.created_at)),
        ("state", "disabled" if account.is_disabled else "active"),
        *_limit_rows(account.limits),
        ("requests this month", str(use.requests)),
        (
            "bytes in, out this month",
            ", ".join(show_about(each, is_binary=is_binary) for each in (use.bytes_in, use.bytes_out)),
        ),
        ("usable tokens", str(sum(token["state"] == "usable" for token in tokens))),
        ("names that it has", " ".join(row["name"] for row in names) or "none"),
    ]
    facts = {**_account_facts(account, use), "tokens": tokens, "tunnels": names}
    return facts, show_table((), rows), ""


def _account_limit(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.name)
    changes = {
        limit.column: limit.parse(getattr(options, limit.column))
        for limit in Limit.ALL
        if getattr(options, limit.column) is not None
    }
    records.change_account(conn, account.id, changes)
    account = records.get_account(conn, account.id)
    words = ", ".join(
        f"{title} {value}" for title, value in _limit_rows(account.limits) if not value.startswith("none")
    )
    return (
        _account_facts(account),
        "",
        f"account {account.name} now has " + (f"the limits: {words}" if words else "no limits of its own"),
    )


def _account_switch(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.name)
    is_disabled = options.action == "disable"
    records.change_account(conn, account.id, {"disabled": is_disabled})
    account = records.get_account(conn, account.id)
    what = "disabled: its agents are cut off within seconds" if is_disabled else "enabled"
    return _account_facts(account), "", f"account {account.name} is {what}"


def _account_delete(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.name)
    records.delete_account(conn, account.id)
    return (
        {"id": account.id, "deleted": True},
        "",
        (f"account {account.name} is gone, with its tokens, names and usage; its agents are cut off within seconds"),
    )


# Tokens ------------------------------------------------------------------------------------------------------------


def _token_facts(token: TokenRecord, account: str) -> dict[str, Any]:
    is_expired = token.expires_at is not None and token.expires_at <= time.time()
    return {
        "id": token.id,
        "account": account,
        "name": token.name,
        "prefix": token.prefix,
        "state": "revoked" if token.revoked_at is not None else "expired" if is_expired else "usable",
        "created_at": show_time(token.created_at),
        "expires_at": show_time(token.expires_at),
        "revoked_at": show_time(token.revoked_at),
        "last_used_at": show_time(token.last_used_at),
    }


def _token_create(conn: sa.Connection, options: Any) -> Answer:
    now = time.time()
    account = records.get_account(conn, options.account)
    expires_in = parse_expiry(options.expires)
    expires_at = None if math.isinf(expires_in) else now + expires_in
    record, token = records.create_token(conn, account.id, options.name, now, expires_at)
    until = f", good until {show_time(expires_at)}" if expires_at is not None else ""
    note = f"token {record.id} of account {account.name}{until}; it is shown only now"
    return {**_token_facts(record, account.name), "token": token}, token, note


def _token_list(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.account) if options.account else None
    found = [_token_facts(*each) for each in records.list_tokens(conn, account.id if account else None)]
    columns = ("id", "account", "name", "prefix", "state", "created_at", "expires_at", "last_used_at")
    header = ("ID", "ACCOUNT", "NAME", "TOKEN", "STATE", "CREATED", "EXPIRES", "LAST USED")
    rows = [tuple(str(facts[column] or "-") for column in columns) for facts in found]
    return found, show_table(header, rows), ""


def _token_revoke(conn: sa.Connection, options: Any) -> Answer:
    token = records.revoke_token(conn, options.token, time.time())
    note = f"token {token.id} ({token.prefix}…) is revoked; agents that use it are cut off within seconds"
    return {"id": token.id, "account_id": token.account_id, "revoked": True}, "", note


# Names and usage ---------------------------------------------------------------------------------------------------


def _name_facts(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": row["name"],
        "account": row["account"],
        "state": "reserved" if row["reserved"] else "claimed",
        "since" if row["reserved"] else "last_seen": show_time(row["at"]),
    }


def _tunnel_reserve(conn: sa.Connection, options: Any) -> Answer:
    account = records.get_account(conn, options.account)
    name = parse_name("tunnel", options.name)
    loser = records.reserve_name(conn, name, account.id, time.time())
    note = f"{name} is reserved for account {account.name}"
    if loser:
        note += f"; account {loser}, which served it last, loses it within seconds"
    return {"name": name, "account": account.name, "taken_from": loser or None}, "", note


def _tunnel_release(conn: sa.Connection, options: Any) -> Answer:
    name = parse_name("tunnel", options.name)
    account = records.unreserve_name(conn, name)
    note = f"{name} is no longer reserved"
    if name != options.domain.apex:
        claiming.keep_claim(conn, name, account.id, time.time() + max(0.0, claiming.SAFE - options.name_hold))
        note += (
            f"; account {account.name} keeps it while it serves it, and for -name-hold after that; "
            f"to give it to another account: tunnel reserve {name} ACCOUNT"
        )
    return {"name": name, "account": account.name, "released": True}, "", note


def _tunnel_list(conn: sa.Connection, options: Any) -> Answer:
    found = [_name_facts(row) for row in records.list_names(conn)]
    rows = [(row["name"], row["account"], row["state"], row.get("since") or row["last_seen"]) for row in found]
    return found, show_table(("NAME", "ACCOUNT", "STATE", "SINCE OR LAST SEEN"), rows), ""


def _usage(conn: sa.Connection, options: Any) -> Answer:
    month = options.month or month_of(time.time())[0]
    account = records.get_account(conn, options.account) if options.account else None
    found = records.list_usage(conn, month, account.id if account else None)
    answer = [{"account": each.name, "account_id": each.id, "month": month, **asdict(use)} for each, use in found]
    rows = [
        (each.name, month, str(use.requests), show_about(use.bytes_in), show_about(use.bytes_out))
        for each, use in found
    ]
    return answer, show_table(("ACCOUNT", "MONTH", "REQUESTS", "BYTES IN", "BYTES OUT"), rows), ""


_ACTIONS: dict[tuple[str, str], Action] = {
    ("account", "create"): _account_create,
    ("account", "list"): _account_list,
    ("account", "show"): _account_show,
    ("account", "limit"): _account_limit,
    ("account", "disable"): _account_switch,
    ("account", "enable"): _account_switch,
    ("account", "delete"): _account_delete,
    ("token", "create"): _token_create,
    ("token", "list"): _token_list,
    ("token", "revoke"): _token_revoke,
    ("tunnel", "reserve"): _tunnel_reserve,
    ("tunnel", "release"): _tunnel_release,
    ("tunnel", "list"): _tunnel_list,
    ("usage", ""): _usage,
}
_BEGINNINGS = {("account", "create"), ("migrate", "")}
_READS = {("account", "list"), ("account", "show"), ("token", "list"), ("tunnel", "list"), ("usage", "")}
_WRITES = _ACTIONS.keys() - _READS
