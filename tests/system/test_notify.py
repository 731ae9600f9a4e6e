"""What systemd hears from real programs through NOTIFY_SOCKET: ready, alive, reloading, stopping; and silence."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import RunningAgent, RunningCore, poll
from service import Service

pytestmark = pytest.mark.system


class Systemd:
    """The listening end."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.settimeout(10)
        self.environment = {"NOTIFY_SOCKET": str(path)}

    def hear(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self._sock.recv(4096).decode().splitlines())

    def hear_until(self, key: str) -> list[str]:
        """Keys of the messages up to the one that has this key, signs of life left out."""
        heard: list[str] = []
        while key not in heard:
            heard += [name for name in self.hear() if name not in ("STATUS", "WATCHDOG")]
        return heard

    def is_silent(self, seconds: float) -> bool:
        self._sock.settimeout(seconds)
        try:
            return not self._sock.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._sock.settimeout(10)

    def drain(self) -> None:
        """Forget what was said so far."""
        while not self.is_silent(0.001):
            pass

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    end = Systemd(tmp_path / "notify")
    yield end
    end.close()


def test_a_core_says_how_it_is(systemd: Systemd, start_core: Callable[..., RunningCore]) -> None:
    core = start_core(environment={**systemd.environment, "WATCHDOG_USEC": "400000"})
    said = systemd.hear()
    assert (said["READY"], said["STATUS"]) == ("1", "serving")
    assert [systemd.hear() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
    core.process.send_signal(signal.SIGHUP)
    assert systemd.hear_until("RELOADING") == ["RELOADING", "MONOTONIC_USEC"]
    assert systemd.hear_until("READY") == ["READY"]
    core.stop()
    systemd.drain()
    assert systemd.is_silent(0.6)  # it would have spoken three times
    core.cont()
    assert systemd.hear() == {"WATCHDOG": "1"}
    core.terminate()
    assert systemd.hear_until("STOPPING") == ["STOPPING"]
    assert core.wait() == 0


def test_a_successor_becomes_the_service(systemd: Systemd, start_core: Callable[..., RunningCore]) -> None:
    core = start_core(environment=systemd.environment)
    assert systemd.hear_until("READY") == ["READY"]
    core.process.send_signal(signal.SIGUSR2)
    pid = int(core.wait_for("upgrade: successor started")["pid"])
    said = [systemd.hear(), systemd.hear()]  # in either order
    assert {"MAINPID": str(pid)} in said
    assert {"READY": "1", "STATUS": "serving"} in said
    assert core.process.wait(20) == 0
    os.kill(pid, signal.SIGTERM)
    assert systemd.hear_until("STOPPING") == ["STOPPING"]


def test_an_agent_is_ready_before_its_core(
    systemd: Systemd,
    start_core: Callable[..., RunningCore],
    start_agent: Callable[..., RunningAgent],
    start_service: Callable[[], Service],
) -> None:
    core = start_core()
    core.close()
    agent = start_agent(core, start_service().url, ready=False, environment=systemd.environment)
    assert systemd.hear()["READY"] == "1"
    agent.terminate()
    assert systemd.hear_until("STOPPING") == ["STOPPING"]
    assert agent.wait() == 0


def test_nobody_listens(start_core: Callable[..., RunningCore], tmp_path: Path) -> None:
    """A path that is gone, and odd values, keep nothing from serving."""
    core = start_core(environment={"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "many"})
    poll(lambda: core.find("core ready"), "the core serves")
