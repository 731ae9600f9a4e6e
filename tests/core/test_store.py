"""The store: made once, migrated, private, seen by layers, and clear about what is wrong with it."""

import re
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import trio

from tunnel.core import records, tables
from tunnel.core.database import Database, StoreError
from tunnel.core.store import OPERATIONS, READERS, Store
from tunnel.errors import ConfigError
from tunnel.handler import Handler, QueryVisit, RequestVisit


def test_the_migrations_make_exactly_the_tables(database_url: str, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(database_url, tmp_path)
    assert database.open() == ("", tables.REVISIONS[-1])
    assert database.open() == (tables.REVISIONS[-1], tables.REVISIONS[-1])
    with database.transaction() as conn:
        assert compare_metadata(MigrationContext.configure(conn), tables.metadata) == []
    database.close()


def test_the_known_revisions_are_those_in_the_directory() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == tables.REVISIONS


def test_every_migration_can_be_undone(database_url: str, tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    database = Database(database_url, tmp_path)
    database.open()
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
    with database.transaction(write=True) as conn:
        config.attributes["connection"] = conn
        command.downgrade(config, "base")
    with database.transaction() as conn:
        assert set(sa.inspect(conn).get_table_names()) == {"alembic_version"}
    assert database.open() == ("", tables.REVISIONS[-1])
    database.close()


def test_a_failing_migration_leaves_nothing(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunnel.core import database as module

    real = module.migrate

    def broken(conn: sa.Connection) -> None:
        real(conn)
        conn.execute(sa.text("SELECT no_such_column FROM accounts"))

    database = Database(database_url, tmp_path)
    monkeypatch.setattr(module, "migrate", broken)
    with pytest.raises(ConfigError, match="no_such_column"):
        database.open()
    with database.transaction() as conn:
        assert sa.inspect(conn).get_table_names() == []
    monkeypatch.setattr(module, "migrate", real)
    database.open()
    database.close()


def test_a_store_from_a_newer_program_is_refused(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url, tmp_path)
    database.open()
    with database.transaction(write=True) as conn:
        conn.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="schema 9999, newer than this program knows"):
        database.open()
    database.close()


def test_two_processes_may_start_at_once(database_url: str, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tunnel.core.database import Database; sys.stdin.readline();"
        "Database(sys.argv[1], pathlib.Path(sys.argv[2])).open()"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, database_url, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for start in starts:
        assert start.stdin is not None
        start.stdin.write(b"\n")
        start.stdin.flush()
    for start in starts:
        _, errors = start.communicate(timeout=60)
        assert (start.returncode, errors) == (0, b"")


def test_an_up_to_date_store_does_not_import_alembic(tmp_path: Path) -> None:
    Database("", tmp_path).open()
    code = (
        "import sys, pathlib; from tunnel.core.database import Database;"
        "Database('', pathlib.Path(sys.argv[1])).open(); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


async def test_the_file_is_private_and_in_wal_mode(tmp_path: Path) -> None:
    store = Store("", tmp_path / "state")
    await store.open()
    async with trio.open_nursery():
        await store.query("revision.read", records.bump_revision, write=True)
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    pragmas = await store.query(
        "revision.read",
        lambda conn: [
            conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys", "busy_timeout")
        ],
    )
    assert pragmas == ["wal", 1, 10_000]
    await store.close()


async def test_queries_are_visits(database_url: str, tmp_path: Path) -> None:
    seen: list[QueryVisit] = []

    def layer(handler: Handler) -> Handler:
        async def layered(visit: Any) -> None:
            assert visit.outcome == ""
            seen.append(visit)
            await handler(visit)

        return layered

    store = Store(database_url, tmp_path, [layer])
    await store.open()
    parent = RequestVisit("192.0.2.1", "http")
    assert await store.query("revision.read", records.read_revision, parent=parent) == 1
    with pytest.raises(StoreError):
        await store.query("token.find", lambda conn: conn.execute(sa.text("SELECT nonsense")))
    await store.close()
    assert [(visit.operation, visit.outcome) for visit in seen] == [
        ("store.open", "ok"), ("revision.read", "ok"), ("token.find", "internal")
    ]  # fmt: skip
    assert {visit.operation for visit in seen} <= set(OPERATIONS)
    assert {visit.system for visit in seen} == {"postgresql" if database_url else "sqlite"}
    assert seen[1].parent is parent
    assert "nonsense" in seen[2].error


async def test_operations_are_a_closed_set(sqlite_store: Store) -> None:
    with pytest.raises(ValueError, match=r"unknown operation 'made.up'"):
        await sqlite_store.query("made.up", records.read_revision)


async def test_a_raising_query_is_rolled_back(store: Store) -> None:
    def work(conn: sa.Connection) -> None:
        records.create_account(conn, "acme", 1.0)
        raise KeyError("changed its mind")

    with pytest.raises(KeyError):
        await store.query("account.default", work, write=True)
    assert await store.query("account.default", records.count_accounts) == 0


async def test_the_run_loop_turns_while_a_query_waits(store: Store) -> None:
    go = threading.Event()
    begun = trio.Event()

    def work(conn: sa.Connection) -> int:
        trio.from_thread.run_sync(begun.set)
        assert go.wait(30)
        return records.read_revision(conn)

    answers = []

    async def ask() -> None:
        answers.append(await store.query("revision.read", work))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await begun.wait()  # we run although the query does
        go.set()
    assert answers == [1]


async def test_a_cancelled_read_is_left_behind_and_a_cancelled_write_ends(store: Store) -> None:
    go = threading.Event()
    begun = trio.Event()

    def read(conn: sa.Connection) -> None:
        begun_in_loop()
        assert go.wait(30)

    def begun_in_loop() -> None:
        trio.from_thread.run_sync(begun.set, trio_token=token)

    token = trio.lowlevel.current_trio_token()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.query("token.find", read))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert not go.is_set()  # the nursery ended although the thread still waits
    go.set()

    begun = trio.Event()

    def write(conn: sa.Connection) -> None:
        begun_in_loop()
        records.create_account(conn, "acme", 1.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.query("account.default", write, write=True))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert await store.query("account.default", records.count_accounts) == 1


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_program_that_ends_does_not_wait_for_a_write_that_hangs(
    sqlite_store: Store, is_cancelled: bool, autojump_clock: trio.testing.MockClock
) -> None:
    go, begun = threading.Event(), threading.Event()
    failures: list[str] = []

    def hang(conn: sa.Connection) -> None:
        begun.set()
        assert go.wait(30)

    async def write() -> None:
        try:
            await sqlite_store.query("usage.add", hang, write=True)
        except StoreError as exc:
            failures.append(str(exc))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while not begun.is_set():
                await trio.lowlevel.checkpoint()
            nursery.start_soon(write)  # waits for its turn
            await trio.lowlevel.checkpoint()
            began = trio.current_time()
            sqlite_store.end_by(began + 2)
            sqlite_store.end_by(began + 60)  # the first word counts
            if is_cancelled:
                nursery.cancel_scope.cancel()
        assert trio.current_time() - began == pytest.approx(2)
        assert len(failures) == (1 if is_cancelled else 2)
        assert all("did not answer before this program had to end" in text for text in failures)
    finally:
        go.set()


async def test_a_program_that_ends_does_not_wait_behind_reads_that_hang(
    store: Store, autojump_clock: trio.testing.MockClock
) -> None:
    """They are given up, and their threads go on: of a database that hangs as many as there may be."""
    go = threading.Event()
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(2 * READERS):
                nursery.start_soon(partial(store.query, "revision.read", lambda conn: go.wait(30)))
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        began = trio.current_time()
        store.end_by(began + 2)
        with trio.fail_after(10), suppress(StoreError):  # where reads have places of their own it may come through
            await store.query("usage.add", records.count_accounts, write=True)
        assert trio.current_time() - began <= 2.1
    finally:
        go.set()


async def test_a_close_that_hangs_is_left_behind(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    go, closed = threading.Event(), threading.Event()

    def hang() -> None:
        go.wait(30)
        closed.set()

    monkeypatch.setattr(sqlite_store.database, "close", hang)
    try:
        with trio.move_on_after(1) as scope:
            await sqlite_store.close()
        assert scope.cancelled_caught and not closed.is_set()
    finally:
        go.set()


async def test_writers_do_not_collide(store: Store) -> None:
    def work(conn: sa.Connection) -> None:
        records.read_revision(conn)  # reads first: the case that fails at once with a plain BEGIN
        records.bump_revision(conn)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(lambda: store.query("revision.read", work, write=True))
    assert await store.query("revision.read", records.read_revision) == 21


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("not a url", "is not a URL"),
        ("postgresql://u:hush-hush@host:port/x", "is not a URL"),
        ("mysql://u:hush-hush@host/x", "mysql is not supported"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_bad_urls(url: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Database(url, tmp_path)
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize(
    "exc", [ModuleNotFoundError("No module named 'psycopg'"), ImportError("no pq wrapper available")]
)
def test_without_psycopg_it_says_what_to_install(
    exc: ImportError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none(*args: object, **options: object) -> None:
        raise exc

    monkeypatch.setattr("sqlalchemy.create_engine", find_none)
    with pytest.raises(ConfigError) as caught:
        Database("postgresql://u:hush-hush@127.0.0.1:1/x", tmp_path)
    assert str(caught.value) == "PostgreSQL needs the package psycopg: pip install 'trio-tunnel[postgresql]'"
    assert "postgresql" in metadata("trio-tunnel").get_all("Provides-Extra", [])


async def test_an_unreachable_server_is_one_line_without_the_password(tmp_path: Path) -> None:
    store = Store("postgres://u:hush-hush@127.0.0.1:1/x", tmp_path)
    with pytest.raises(StoreError, match="refused") as caught:
        await store.open()
    assert caught.value.is_away
    assert "hush-hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    await store.close()


async def test_a_wrong_password_is_not_repeated(postgresql: Any, tmp_path: Path) -> None:
    url = postgresql.url("postgres").replace("pg-secret-word", "hush%20hush")
    store = Store(url, tmp_path)
    with pytest.raises(ConfigError, match="password authentication failed") as caught:
        await store.open()
    assert "hush hush" not in str(caught.value) and "hush%20hush" not in str(caught.value)
    await store.close()


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "tunnel.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(ConfigError, match="not a database"):
        await Store("", tmp_path).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the store"):
        await Store("", tmp_path / "file").open()


async def test_a_sqlite_url_names_the_file(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/mine.db", tmp_path / "unused")
    await store.open()
    await store.close()
    assert (tmp_path / "mine.db").stat().st_size > 0
    assert not (tmp_path / "unused").exists()


def test_a_store_of_the_first_schema_keeps_what_it_has(database_url: str, tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    database = Database(database_url, tmp_path)
    database.open()
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
    with database.transaction(write=True) as conn:
        account = records.create_account(conn, "acme", 1.0)
        records.change_account(conn, account.id, {"max_connections": 3})
        config.attributes["connection"] = conn
        command.downgrade(config, "0001")
    assert database.open() == ("0001", tables.REVISIONS[-1])
    with database.transaction() as conn:
        limits = records.get_account(conn, "acme").limits
    assert (limits.max_connections, limits.max_names, limits.max_ports) == (3, None, None)
    database.close()
