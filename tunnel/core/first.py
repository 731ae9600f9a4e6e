"""The first start: an account and a token, so that two terminals suffice to try it."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tunnel.core import records
from tunnel.core.private import write_secret
from tunnel.core.store import Store
from tunnel.core.tokens import hash_token
from tunnel.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The account that the first start made, where its token is, and whether that start is this one."""

    account_id: str
    account: str
    path: Path
    is_new: bool = True


async def ensure_default(store: Store, data_dir: Path) -> FirstToken | None:
    """In a store without accounts make the account `default` with a token in `<data_dir>/default.token` (0600).

    A later start finds them again as long as no agent has ever come in: the first one may have failed behind this, and
    said nothing. None in any other store. The file is there before the store commits: a start that is killed half way
    begins again. Raises ConfigError or StoreError.
    """
    path = data_dir / "default.token"

    def make(conn: sa.Connection) -> FirstToken | None:
        records.bump_revision(conn)  # also the lock against another core's first start
        if records.count_accounts(conn):
            return None
        now = time.time()
        account = records.create_account(conn, "default", now)
        _, token = records.create_token(conn, account.id, "first start", now, None)
        try:
            write_secret(path, token + "\n")
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from None
        return FirstToken(account.id, account.name, path)

    def find(conn: sa.Connection) -> tuple[bool, FirstToken | None]:
        is_first = not records.count_accounts(conn)
        return is_first, None if is_first or records.has_been_used(conn) else _find(conn, path)

    is_first, found = await store.query("account.default", find)
    return found if not is_first else await store.query("account.default", make, write=True)


def _find(conn: sa.Connection, path: Path) -> FirstToken | None:
    """Of an earlier start, if an agent could use it now."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    _, record, account = records.find_token(conn, hash_token(token))
    if record is None or account is None or account.is_disabled or record.revoked_at is not None:
        return None
    return FirstToken(account.id, account.name, path, is_new=False)


def agent_command(server: str, token_file: Path, fingerprint: str) -> str:
    """For a shell: what connects an agent, with the Python that we were called with (a bare `python` has no Trio)."""
    trust = ["-server-fingerprint", fingerprint] if fingerprint else ["-tls=false"]
    program = [sys.orig_argv[0] or sys.executable, "-m", "tunnel.agent"]
    given = ["-server", server, "-token-file", str(token_file), *trust, "-local", "http://localhost:3000"]
    return shlex.join([*program, *given])


def leave_invitation(directory: Path, token_file: Path, fingerprint: str) -> None:
    """What an agent needs that shares this directory with us and nothing else: `token` and `fingerprint` (0600).

    The token is that of the first start, as long as its file is in the data directory. Raises ConfigError.
    """
    try:
        if token_file.exists():
            write_secret(directory / "token", token_file.read_text())
        if fingerprint:
            write_secret(directory / "fingerprint", fingerprint + "\n")
    except OSError as exc:
        raise ConfigError(f"-invite-dir: can't write to {directory} ({exc.strerror}); give another one") from None
