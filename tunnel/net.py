"""Sockets on Trio: dial, and a stream that tries before it waits. (Listening: tunnel/listening.py.)

On loopback and on busy links the bytes are usually there already, so `recv` and `send` go to the kernel first and only
then wait (`trio.lowlevel.wait_readable`). Plain sockets and those under TLS (tunnel/tls.py) go through the same code.
"""

from __future__ import annotations

import errno
import os
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

RECV_SIZE = 64 * 1024
TLS_RECORD = 16 * 1024  #: bytes in a record at most (RFC 8446, 5.1)
RECORDS = 16  #: that are read in a row before others have their turn
EAGER = 256 * 1024  #: bytes that may come to a task without a wait before it lets others run
_EAGER_EACH = 4096  #: what a read counts at least: work goes with reads too
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
OUR_OWN_TROUBLE = frozenset(map(os.strerror, OUT_OF_FILES))  #: reasons of our process, not of the other end
LOOPBACK = ("127.0.0.1", "::1")

_TCP_INFO = getattr(socket, "TCP_INFO", 11)
_TCP_INFO_SIZE = 216  # up to tcpi_bytes_retrans (linux/tcp.h)

#: a peer that vanished is noticed after two minutes (the kernel's own: two hours), where nothing else has a deadline
_KEEPALIVE = [
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
]

HERE, HALF_CLOSED, GONE = "here", "half closed", "gone"


class Socket(trio.abc.HalfCloseableStream):
    """A connected TCP socket, plain or TLS.

    `recv` and `send` are the fast way: no checkpoint when the kernel has an answer at once, but `recv` lets others run
    after EAGER bytes, so that a peer who always has more to say starves nobody. `receive_some` and `send_all` keep
    Trio's whole contract. One task may receive while another sends.
    Raises trio.BrokenResourceError when the connection failed, trio.ClosedResourceError when we closed it.
    """

    __slots__ = ("_eager", "_ended", "_poll", "_receiving", "_sending", "has_rest", "is_closed", "on_close", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_closed = False
        self.has_rest = False  # `recv_here` has left something, of which the kernel does not tell again
        self.on_close: Callable[[], None] | None = None  # called once, when we close it
        self._eager = 0
        self._receiving = False
        self._sending = False
        self._ended = False  # our direction
        self._poll: Any = None  # for `_has_more`

    @property
    def is_plain(self) -> bool:
        """No TLS: what has come is what the kernel says has come."""
        return type(self.sock) is socket.socket

    # Receiving

    def recv_nowait(self, size: int = RECV_SIZE) -> bytes | None:
        """What is there: bytes, b"" at the end, None when nothing is there yet."""
        try:
            return self.sock.recv(size)
        except _WOULD_BLOCK:
            return None
        except OSError as exc:
            raise self._failed(exc) from exc

    def recv_here(self, size: int = RECV_SIZE) -> bytes | None:
        """As `recv_nowait`, and under TLS what several records bring. `has_rest` says whether to read once more: there
        are more bytes than `size`, more records than RECORDS (a peer may make them tiny), or an end behind them."""
        self.has_rest = False
        data = self.recv_nowait(size)
        if not data:
            return data
        if type(self.sock) is not socket.socket:
            for _ in range(RECORDS - 1):
                if len(data) >= size or not self._has_more():
                    break
                try:
                    more = self.recv_nowait(size - len(data))
                except trio.BrokenResourceError:
                    more = b""  # to who reads next it is an end, too
                if not more:
                    self.has_rest = more is not None
                    return data
                data += more
            else:
                self.has_rest = True
        self.has_rest = self.has_rest or len(data) >= size
        return data

    async def recv(self, size: int = RECV_SIZE) -> bytes:
        """The next bytes; b"" at the end."""
        if self._eager > EAGER:
            self._eager = 0
            await trio.lowlevel.checkpoint()
        while True:
            try:
                data = self.sock.recv(size)
                self._eager += len(data) + _EAGER_EACH
                return data
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(self.sock)
                self._eager = 0
            except OSError as exc:
                raise self._failed(exc) from exc

    async def recv_later(self, size: int = RECV_SIZE) -> bytes:
        """As `recv`, where nothing can be there yet: waits first, which saves the kernel's word that it is so."""
        sock = self.sock
        if self.is_closed or type(sock) is not socket.socket:  # TLS may hold bytes that the kernel knows nothing of
            return await self.recv(size)
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(size)
        except BlockingIOError:
            return await self.recv(size)
        except OSError as exc:
            raise self._failed(exc) from exc
        self._eager = len(data) + _EAGER_EACH
        return data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            if self.is_closed:
                raise trio.ClosedResourceError
            return await self.recv(max_bytes or RECV_SIZE)
        finally:
            self._receiving = False

    # Sending

    def send_nowait(self, data: bytes | memoryview) -> int:
        """How many bytes the kernel took. What is left must be sent next, in parts of at least TLS_RECORD."""
        if len(data) > TLS_RECORD and type(self.sock) is not socket.socket:
            return self._send_records(data)
        try:
            return self.sock.send(data)
        except _WOULD_BLOCK:
            return 0
        except OSError as exc:
            raise self._failed(exc) from exc

    def _send_records(self, data: bytes | memoryview) -> int:
        """Under TLS, record by record. OpenSSL takes a whole write or says that it took nothing, with half of it gone:
        it would then insist on as many bytes again, and who goes on with fewer breaks the connection."""
        view, sent = memoryview(data), 0
        try:
            while sent < len(view):
                sent += self.sock.send(view[sent : sent + TLS_RECORD])
        except _WOULD_BLOCK:
            pass
        except OSError as exc:
            raise self._failed(exc) from exc
        return sent

    async def send(self, data: bytes) -> None:
        """Send all of it. When cancelled, how much went is unknown: the connection is of no more use."""
        sent = self.send_nowait(data)
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self.sock)
            except OSError as exc:
                raise self._failed(exc) from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            if self.is_closed or self._ended:
                raise trio.ClosedResourceError
            await self.send(bytes(data))
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            if self.is_closed:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_writable(self.sock)
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        await trio.lowlevel.checkpoint()
        if self.is_closed:
            raise trio.ClosedResourceError
        await self.finish()

    async def finish(self) -> None:
        """End our direction, once the other end has taken so much that the end finds room."""
        while not self.shutdown():
            await trio.lowlevel.wait_writable(self.sock)

    def shutdown(self) -> bool:
        """End our direction. Over TLS that sends close_notify: False where the kernel has no room for it now."""
        self._ended = True
        try:
            if isinstance(self.sock, TlsSocket):
                # The first call sends our close_notify and then wants the other's, which we need not wait for.
                self.sock.unwrap()
            else:
                self.sock.shutdown(socket.SHUT_WR)
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError):
            pass
        return True

    # Closing

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

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
        except _WOULD_BLOCK:
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

    async def handshake(self) -> None:
        """The TLS handshake; nothing on a plain socket. Raises ssl.SSLError, trio.BrokenResourceError."""
        if not isinstance(self.sock, TlsSocket):
            return
        while True:
            try:
                self.sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLError:
                raise
            except OSError as exc:
                raise self._failed(exc) from exc


def tune(sock: socket.socket) -> None:
    """No Nagle; notice peers that vanished without a word."""
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        pass


def limit_unsent(sock: socket.socket, size: int) -> None:
    """Let the kernel hold little that is unsent, so that urgent frames don't queue behind bulk there."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if hasattr(select, "epoll") else None)
    if option is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, size)
        except OSError:
            pass


def is_localhost(host: str) -> bool:
    """A name that means this machine, whatever a resolver says (RFC 6761, 6.3)."""
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


async def dial(host: str, port: int) -> Socket:
    """Connect, trying a name's addresses in Trio's way; for localhost both loopback addresses, also where the resolver
    knows one of them only. Raises OSError."""
    if not is_localhost(host):
        return await _dial(host, port)
    try:
        infos = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        infos = []
    addresses = list(dict.fromkeys([*(str(info[4][0]) for info in infos), *LOOPBACK]))
    reasons: list[str] = []
    for address in addresses:
        try:
            return await _dial(address, port)
        except OSError as exc:
            reasons.append(reason_of(exc))
            if reasons[-1] in OUR_OWN_TROUBLE:
                raise
    refused = os.strerror(errno.ECONNREFUSED)  # says more than that there is no IPv6 here
    raise OSError(f"{refused if refused in reasons else reasons[0]} (tried {' and '.join(addresses)})")


async def _dial(host: str, port: int) -> Socket:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except BaseExceptionGroup as group:
        # Cancelled while it connects, a nursery in there makes a group of it, which nobody takes for Cancelled.
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup) and group.split(trio.Cancelled)[1] is None:
            leaf = leaf.exceptions[0]
        raise leaf from None
    sock = socket.socket(fileno=stream.socket.detach())
    tune(sock)
    return Socket(sock)


def reason_of(exc: BaseException) -> str:
    """Why a connection failed, in the system's few words: Trio puts one OSError an address in a group."""
    inner: BaseException = exc.__cause__ if exc.__cause__ is not None else exc
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[-1]
    if isinstance(inner, ssl.SSLError):
        return str(inner.reason or inner)
    if isinstance(inner, OSError):
        if inner.errno is not None and not isinstance(inner, socket.gaierror):
            return os.strerror(inner.errno)
        return inner.strerror or str(inner)
    return str(inner) or type(inner).__name__


def socket_of(number: int) -> Socket:
    """The connection behind a file descriptor that another process has passed on."""
    sock = socket.socket(fileno=number)
    tune(sock)
    return Socket(sock)


def with_tls(stream: Socket, context: ssl.SSLContext, *, server_side: bool, server_name: str = "") -> Socket:
    """The same connection under TLS; `handshake()` comes next.

    Raises trio.BrokenResourceError when the other end has reset it already; the connection is closed then.
    """
    try:
        stream.sock.getpeername()
    except OSError as exc:
        stream.close()
        raise trio.BrokenResourceError(str(exc)) from exc
    return Socket(TlsSocket(stream.sock, context, server_side=server_side, server_name=server_name))


def address_text(address: Any) -> str:
    """host:port of a socket address, IPv4-mapped addresses in their own form."""
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
