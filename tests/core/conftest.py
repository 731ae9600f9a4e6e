"""Both stores for every test that asks for one, and clocks that tests set."""

import importlib
import importlib.util
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunnel.core.store import Store


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tests_core_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["by its task", "quickly", "quickly over TLS"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cores of tests/core/inprocess.py serve requests by their connections' tasks, or without them where they can."""
    inprocess: Any = importlib.import_module("inprocess")
    inprocess.is_quick, inprocess.is_secure = request.param != "by its task", request.param.endswith("TLS")
    yield
    inprocess.is_quick = inprocess.is_secure = False


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    server = _load("postgres").PostgreSQL()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store: "" (SQLite in tmp_path) and a new PostgreSQL database."""
    if request.param == "sqlite":
        return ""
    url: str = request.getfixturevalue("postgresql").database()
    return url


@pytest.fixture
async def store(database_url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """An open, empty store, SQLite and PostgreSQL in turn."""
    store = Store(database_url, tmp_path)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store is asked for: operations, in their order."""
    operations: list[str] = []
    query = store.query

    async def noted(operation: str, work: Any, **more: Any) -> Any:
        operations.append(operation)
        return await query(operation, work, **more)

    monkeypatch.setattr(store, "query", noted)
    return operations


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store("", tmp_path)
    await store.open()
    yield store
    await store.close()


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Clock:
    """2026-11-23 12:00:00 UTC."""
    return Clock(1795435200.0)


@pytest.fixture
def ticks() -> Clock:
    """For `monotonic`."""
    return Clock(math.pi * 1000)
