"""What systemd is told about a program of ours: ready, reloading, stopping, alive.

A service of `Type=notify` finds a datagram socket in NOTIFY_SOCKET, and with `WatchdogSec=` the time after which it is
taken for hung in WATCHDOG_USEC. The run loop itself feeds the watchdog, so that a loop that stands still is seen.
Without these variables nothing is sent and nothing runs. Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from time import monotonic_ns

import trio


class Notifier:
    """`environ`: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are looked up. Never raises for what they hold."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path if path.startswith("/") else ""
        self._watchdog = 0.0  #: seconds between signs of life; 0: nobody asks
        usec = environ.get("WATCHDOG_USEC", "")
        if self._address and usec.isdecimal() and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self._watchdog = int(usec) / 2e6  # half of it, as its manual page asks

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """`ready` ends it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")

    def main_pid(self, pid: int) -> None:
        """From now on another process is the service."""
        self._tell(f"MAINPID={pid}")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=draining")

    async def feed_watchdog(self) -> None:
        """Signs of life until cancelled; returns at once if nobody asks for them."""
        while self._watchdog:
            self._tell("WATCHDOG=1")
            await trio.sleep(self._watchdog)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            pass  # nobody listens any more: not a reason to stop serving
