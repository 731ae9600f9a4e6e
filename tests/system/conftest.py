"""Fixtures of the system tests: programs that are always ended, and one tunnel that the cheap tests share.

start_core(*flags) → RunningCore, start_agent(core, local, *flags, …) → RunningAgent, start_service() → Service: for one
test each, ended (and checked) after it, newest first. `start_core` uses its own directory under tmp_path.
tunnel → Tunnel(core, agent, service, host): one for the session; tests must not stop it. `host` is its public name,
`tunnel.connect()` a visitor's raw connection to it (tests/system/visiting.py).
What they give is documented on top of running.py, service.py and visiting.py in this directory; a test imports its
types from there (`from pair import Tunnel`), never from conftest, a name that other directories have too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from pair import Tunnel
from running import RunningAgent, RunningCore
from service import Service


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    """What a test started, ended after it in the reverse order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start_core(tmp_path: Path, ending: ExitStack) -> Callable[..., RunningCore]:
    count = iter(range(100))

    def start(*flags: str, data_dir: Path | None = None, **options: Any) -> RunningCore:
        core = RunningCore(data_dir or tmp_path / f"core{next(count)}", *flags, **options)
        ending.callback(core.close)
        return core

    return start


@pytest.fixture
def start_agent(ending: ExitStack) -> Callable[..., RunningAgent]:
    def start(core: RunningCore, local: str, *flags: str, **options: Any) -> RunningAgent:
        agent = RunningAgent(core, local, *flags, **options)
        ending.callback(agent.close)
        return agent

    return start


@pytest.fixture
def start_service(ending: ExitStack) -> Callable[..., Service]:
    def start(port: int = 0) -> Service:
        service = Service(port)
        ending.callback(service.close)
        return service

    return start


@pytest.fixture(scope="session")
def tunnel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    with ExitStack() as stack:
        service = Service()
        stack.callback(service.close)
        core = RunningCore(tmp_path_factory.mktemp("shared") / "core", "-tcp-ports=0")
        stack.callback(core.close)
        agent = RunningAgent(core, service.url, "-subdomain=app", agent_id="shared")
        stack.callback(agent.close)
        yield Tunnel(core, agent, service, "app.localhost")
