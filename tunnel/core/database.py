"""The relational database under the store, seen synchronously: URL, opening, migrating, transactions, its failures.

SQLite is the default: one file in the data directory, readable by its owner only, in WAL mode, so readers never wait
for the writer, and with its default durability: what was committed survives a power cut. PostgreSQL comes by URL.
Commands use this directly; a running core goes through `store.Store`, which puts every call into a thread.

Writers on SQLite begin with BEGIN IMMEDIATE: a transaction that reads first and writes later would otherwise fail at
once, without waiting, when another process has written in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tunnel.core.private import make_private
from tunnel.core.tables import REVISIONS
from tunnel.errors import ConfigError, TunnelError

#: seconds a SQLite writer waits for another one
BUSY_TIMEOUT = 10.0
#: connections kept open; as many calls can run at once
READERS = 4
#: PostgreSQL: seconds to connect; milliseconds until a silent server counts as gone
_POSTGRESQL_DEFAULTS = {"connect_timeout": "5", "tcp_user_timeout": "10000", "application_name": "tunnel-core"}
#: any number; migrations of this project hold PostgreSQL's advisory lock of this name
_MIGRATION_LOCK = 0x74756E6E656C


#: what a server says that is there, but not ready for us yet, in words since there is no code where it refuses to begin
_NOT_YET = ("starting up", "shutting down", "not yet accepting", "recovery", "too many clients", "remaining connection")


class StoreError(TunnelError):
    """The store could not be reached or did not do what was asked: one line, without secrets.

    is_away: it may work later with the same settings; a server that is down, a file that another program has locked.
    """

    def __init__(self, text: str, *, is_away: bool = False) -> None:
        super().__init__(text)
        self.is_away = is_away


class Database:
    """One database. Thread-safe.

    url: "" (SQLite file in data_dir), "sqlite:///PATH" or "postgresql://USER:PASSWORD@HOST:PORT/NAME".
    Raises ConfigError for a URL that cannot be used. Nothing is opened before `open()`.
    """

    def __init__(self, url: str, data_dir: Path) -> None:
        self.url = _parse(url, data_dir)
        self.system = "sqlite" if self.url.drivername.startswith("sqlite") else "postgresql"
        self.engine = _make_engine(self.url, self.system)
        self._is_closed = False
        self._identity: tuple[int, int] | None = None  # of the SQLite file that was opened

    @property
    def name(self) -> str:
        """The URL without its password, and without what follows a question mark: one may be there too."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    def exists(self) -> bool:
        """False for a SQLite file that is not there; `open` says what else may be wrong."""
        try:
            return self.system != "sqlite" or bool(Path(self.url.database or "").stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def open(self) -> tuple[str, str]:
        """Create and migrate what is missing; returns the schema's version before ("" for a new store) and now.

        Two processes may do so at once: one does the work, the other waits. Raises StoreError for a store that is away,
        ConfigError for one that can't be used.
        """
        try:
            if self.system == "sqlite":
                _make_file(self.url.database or "")
                self._switch_to_wal()
            with self.transaction() as conn:
                before = _version(conn, self.name)
            if before != REVISIONS[-1]:
                with self.transaction(write=True) as conn:
                    if self.system == "postgresql":
                        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                    if _version(conn, self.name) != REVISIONS[-1]:
                        migrate(conn)
        except StoreError as exc:
            if exc.is_away:
                raise
            raise ConfigError(str(exc)) from None
        if self.system == "sqlite":
            self._identity = _identity(self.url.database or "")
        return before, REVISIONS[-1]

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sa.Connection]:
        """A connection in a transaction: committed at the end, rolled back by an exception.

        write: it will write. Raises StoreError for the database's failures.
        """
        if self._identity is not None and _identity(self.url.database or "") != self._identity:
            # Open connections would go on writing into a file that has no name any more, new ones make an empty one.
            raise StoreError(
                f"the store {self.name} was removed or replaced under this program: put the file back, or start again"
            )
        try:
            with self.engine.connect() as conn:
                try:
                    if write:
                        conn = conn.execution_options(begin="BEGIN IMMEDIATE")
                    with conn.begin():
                        yield conn
                finally:
                    if self._is_closed:
                        conn.detach()  # an abandoned query came back after `close()`: no pool takes it any more
        except sa.exc.SQLAlchemyError as exc:
            raise self._failure(exc) from exc

    def close(self) -> None:
        """Close the idle connections now, those in use when their query ends."""
        self._is_closed = True
        self.engine.dispose()

    def _failure(self, exc: Exception) -> StoreError:
        text = self._explain(exc)
        if self.system == "sqlite":
            return StoreError(text, is_away="locked" in text)
        # A server that refuses a connection for good (password, no such database) says so with FATAL.
        is_unconnected = isinstance(exc, sa.exc.OperationalError) and getattr(exc.orig, "sqlstate", None) is None
        return StoreError(
            text, is_away=is_unconnected and ("FATAL" not in text or any(one in text for one in _NOT_YET))
        )

    def _explain(self, exc: Exception) -> str:
        cause = getattr(exc, "orig", None) or exc
        line = " ".join(str(cause).split()) or type(cause).__name__
        password = self.url.password
        if password:
            line = line.replace(str(password), "***")
        return f"the store {self.name} failed: {line}"

    def _switch_to_wal(self) -> None:
        # The switch does not wait for other connections as other statements do, so it is tried again here.
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                connection = self.engine.raw_connection()
                try:
                    cursor = connection.cursor()
                    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                        cursor.execute("PRAGMA journal_mode=WAL")
                    cursor.close()
                finally:
                    connection.close()
                return
            except (sa.exc.SQLAlchemyError, self.engine.dialect.loaded_dbapi.Error) as exc:
                if "locked" not in str(exc) or time.monotonic() > deadline:
                    raise self._failure(exc) from exc
                time.sleep(0.02)


def migrate(conn: sa.Connection) -> None:
    """Bring the schema to the newest version, inside the connection's transaction."""
    from alembic import command  # 370 ms to import, needed once in a store's life
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = conn
    command.upgrade(config, "head")


def _version(conn: sa.Connection, name: str) -> str:
    if not sa.inspect(conn).has_table("alembic_version"):
        return ""
    version = str(conn.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() or "")
    if version and version not in REVISIONS:
        raise ConfigError(
            f"the store {name} has schema {version}, newer than this program knows ({REVISIONS[-1]}): upgrade it"
        )
    return version


def _parse(url: str, data_dir: Path) -> sa.URL:
    if not url:
        return sa.URL.create("sqlite", database=str(data_dir / "tunnel.db"))
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError("database.url is not a URL: postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
    backend = parsed.drivername.partition("+")[0]
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError("database.url: SQLite needs a file, sqlite:///PATH, or leave the URL empty")
        return parsed.set(drivername="sqlite")
    if backend in ("postgresql", "postgres"):
        query = {key: value for key, value in _POSTGRESQL_DEFAULTS.items() if key not in parsed.query}
        return parsed.set(drivername="postgresql+psycopg").update_query_dict(query)
    raise ConfigError(f"database.url: {backend} is not supported; use postgresql:// or sqlite:///")


def _make_engine(url: sa.URL, system: str) -> sa.Engine:
    try:
        if system == "postgresql":
            return sa.create_engine(url, pool_size=READERS * 2, max_overflow=1, pool_pre_ping=True)
        engine = sa.create_engine(
            url,
            pool_size=READERS + 1,
            max_overflow=1,
            connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False},
        )
    except ImportError:  # psycopg is not there, or without a libpq
        raise ConfigError("PostgreSQL needs the package psycopg: pip install 'trio-tunnel[postgresql]'") from None
    except (sa.exc.ArgumentError, TypeError, ValueError):
        raise ConfigError("database.url has a part that is not understood") from None

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves; the driver would not do so before DDL
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begun(conn: sa.Connection) -> None:
        conn.exec_driver_sql(conn.get_execution_options().get("begin", "BEGIN"))

    return engine


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_file(path: str) -> None:
    """An empty database file that only its owner reads, from its first moment; one that exists stays as it is."""
    try:
        make_private(Path(path).parent)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as exc:
        if _identity(path) is not None:
            return
        advice = (
            "; be the user whose store it is, or give another -data-dir" if isinstance(exc, PermissionError) else ""
        )
        raise ConfigError(f"cannot make the store {path}: {exc.strerror}{advice}") from None
