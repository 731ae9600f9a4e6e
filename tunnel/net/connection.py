"""A connection as the kernel has it: what may be asked of it without reading, and how it is closed."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from typing import Any

import trio

from tunnel.tls import TlsSocket

if sys.platform != "win32":
    import fcntl
    import termios

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_TCP_INFO = getattr(socket, "TCP_INFO", 11)
_TCP_INFO_SIZE = 216  # up to tcpi_bytes_retrans (linux/tcp.h)

HERE, HALF_CLOSED, GONE = "here", "half closed", "gone"


class Connection:
    """Of a connected TCP socket, plain or TLS; `Socket` goes on from here with what is received and sent."""

    __slots__ = ("_poll", "has_rest", "is_closed", "on_close", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_closed = False
        self.has_rest = False  # `recv_here` has left something, of which the kernel does not tell again
        self.on_close: Callable[[], None] | None = None  # called once, when we close it
        self._poll: Any = None  # for `_has_more`

    @property
    def is_plain(self) -> bool:
        """No TLS: what has come is what the kernel says has come."""
        return type(self.sock) is socket.socket

    # Closing

    def close(self) -> None:
        """Close now; tasks that wait on it get trio.ClosedResourceError."""
        if not self.is_closed:
            self.is_closed = True
            trio.lowlevel.notify_closing(self.sock)
            on_close, self.on_close = self.on_close, None
            if on_close is not None:
                on_close()
            self.sock.close()

    def wake_receiver(self) -> None:
        """The task in `recv` gets trio.ClosedResourceError; the socket stays open, to be written to."""
        if not self.is_closed:
            trio.lowlevel.notify_closing(self.sock)

    def abort(self) -> None:
        """Close with a reset, so that the other end cannot take what it has for the whole."""
        if not self.is_closed:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass
            self.close()

    def _failed(self, exc: OSError) -> Exception:
        if self.is_closed:
            return trio.ClosedResourceError("this socket was closed here")
        return trio.BrokenResourceError(str(exc))

    # Asking

    def peer(self) -> str:
        """Whether the other end is here, has ended its direction, or is gone; what it sent stays unread.

        On Linux one poll tells (POLLRDHUP also sees an end behind unread bytes); elsewhere a look at the next byte.
        """
        if self.is_closed:
            return GONE
        if hasattr(select, "POLLRDHUP"):
            poll = select.poll()
            poll.register(self.sock, select.POLLRDHUP)
            seen = poll.poll(0)
            if not seen:
                return HERE
            return GONE if seen[0][1] & (select.POLLERR | select.POLLHUP) else HALF_CLOSED
        try:
            plain = socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return HERE
        except OSError:
            return GONE
        return HERE if plain else HALF_CLOSED

    def count_unread(self) -> int:
        """Bytes that the kernel holds because the other end has not taken them yet; 0 where it does not say."""
        if sys.platform == "win32":
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def is_stale(self) -> bool:
        """Whether an idle connection must not be used again: the other end closed it or said something unasked."""
        if not self._has_more():
            return False
        try:
            self.sock.recv(1)
        except WOULD_BLOCK:
            return False
        except OSError:
            return True
        return True

    def _has_more(self) -> bool:
        """Whether a read may find something: bytes, the end, or under TLS a message that is none for us."""
        if self.has_rest:
            return True
        if isinstance(self.sock, TlsSocket) and self.sock.has_waiting:
            return True
        if not hasattr(select, "poll"):
            return True
        if self._poll is None:  # asking it costs a third of a read that finds nothing
            self._poll = select.poll()
            self._poll.register(self.sock, select.POLLIN)
        return bool(self._poll.poll(0))

    def is_unread(self, size: int) -> bool:
        """Whether the other end closed before it got any of the last `size` bytes sent. Asked after its end came.

        A close acknowledges all that had arrived, so what is unacknowledged then came too late to be read. False
        where that can't be told (not Linux, or a kernel before 4.19).
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        except OSError:
            return False
        if len(info) < _TCP_INFO_SIZE or not sys.platform.startswith("linux"):
            return False
        acked = int.from_bytes(info[120:128], sys.byteorder) - 1  # the first is the SYN's
        sent, again = (int.from_bytes(info[at : at + 8], sys.byteorder) for at in (200, 208))
        return sent - again - acked >= size
