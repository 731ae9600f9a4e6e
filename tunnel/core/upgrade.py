"""One core takes over from another without losing a request: the new release starts beside the old one.

On SIGUSR2 a core starts its own command line again and leaves it its listening sockets. Then, over a channel of JSON
lines between the two:

1. the successor has its store, its pages and the agents' port: "ready";
2. the old one stops taking agents, sends its own away, and says which names it serves: "names". The agents dial the
   same port and get the successor; their old links go on serving;
3. when all names are there, or after MOVE_SECONDS: "moved";
4. the old one stops taking visitors: "go". The successor takes them from now on; those who came in between waited in
   the socket. The old one drains: it answers what it has, tells kept connections to close, and ends.

If the successor does not get ready, it is ended, and the old core goes on as if nothing had been.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import trio

from tunnel.core.inherited import HANDOVER
from tunnel.errors import TunnelError
from tunnel.log import get_logger

log = get_logger("tunnel.core")

READY_SECONDS = 30.0  # for the successor to start
MOVE_SECONDS = 10.0  # for the agents to dial the successor
KEEP_SECONDS = 2.0  # that kept connections have for a last request, which is answered with `Connection: close`
NAMES_POLL = 0.02
_MAX_LINE = 1 << 20

_OURS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID")  # meant for one process only


class UpgradeError(TunnelError):
    """The successor did not come up; the text is one line that says why."""


class _Channel:
    """JSON objects, one a line, between the two. At the other's end everything it could say is taken as said."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._buffer = b""

    async def say(self, **message: Any) -> None:
        try:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the next `hear` says it

    async def hear(self) -> dict[str, Any] | None:
        """The next message; None when the other has gone."""
        while b"\n" not in self._buffer:
            try:
                data = await self._stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data or len(self._buffer) > _MAX_LINE:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def aclose(self) -> None:
        await self._stream.aclose()


class Successor:
    """The old core's view of the one that follows."""

    def __init__(self, sockets: Mapping[str, Sequence[socket.socket]]) -> None:
        """Start it. Raises UpgradeError."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as exc:
            raise UpgradeError(f"can't talk to a successor ({exc.strerror})") from exc
        numbers = {name: [sock.fileno() for sock in socks] for name, socks in sockets.items()}
        environ = {name: value for name, value in os.environ.items() if name not in _OURS}
        environ[HANDOVER] = json.dumps({"channel": theirs.fileno(), "sockets": numbers})
        command = [sys.executable, *sys.orig_argv[1:]]
        try:
            self._process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *(number for some in numbers.values() for number in some)],
            )
        except OSError as exc:
            ours.close()
            raise UpgradeError(f"can't start {command[0]} ({exc.strerror})") from exc
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._channel = _Channel(ours)

    async def wait_ready(self) -> None:
        """Raises UpgradeError; then it has been ended."""
        with trio.move_on_after(READY_SECONDS) as scope:
            heard = await self._channel.hear()
            if heard is not None:
                return
            code = await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
            raise UpgradeError(f"the successor ended with exit code {code}; its log says why")
        self._process.kill()
        await trio.to_thread.run_sync(self._process.wait)
        assert scope.cancelled_caught
        raise UpgradeError(f"the successor was not ready within {READY_SECONDS:g} s")

    async def wait_moved(self, names: Iterable[str]) -> bool:
        """Until the agents of these names are there, or it gives up waiting. False: it is gone."""
        await self._channel.say(names=sorted(names))
        with trio.move_on_after(MOVE_SECONDS + 2):
            return await self._channel.hear() is not None
        return self._process.poll() is None

    def end(self) -> None:
        self._process.terminate()

    async def go(self) -> None:
        """Let it take visitors."""
        await self._channel.say(go=True)
        await self._channel.aclose()


class Predecessor:
    """The successor's view of the core that it follows."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = _Channel(sock)

    async def follow(self, names_here: Callable[[], Container[str]]) -> None:
        """Take over its agents, and wait for its word that visitors are ours. names_here: what is served here now."""
        names = await self._ready()
        with trio.move_on_after(MOVE_SECONDS) as scope:
            while True:
                here = names_here()
                missing = [name for name in names if name not in here]
                if not missing:
                    break
                await trio.sleep(NAMES_POLL)
        if scope.cancelled_caught:
            log.warning("upgrade: not all agents came", missing=len(missing), names=sorted(missing)[:10])
        await self._moved()

    async def _ready(self) -> list[str]:
        """Say that agents are taken; returns the names to wait for."""
        await self._channel.say(ready=True)
        heard = await self._channel.hear()
        return [str(name) for name in heard.get("names", [])] if heard else []

    async def _moved(self) -> None:
        """Say that the agents are here, and wait for the word to take visitors."""
        await self._channel.say(moved=True)
        with trio.move_on_after(MOVE_SECONDS):
            await self._channel.hear()
        await self._channel.aclose()
