"""The stream that everybody uses: it tries before it waits.

On loopback and on busy links the bytes are usually there already, so `recv` and `send` go to the kernel first and only
then wait (`trio.lowlevel.wait_readable`). Plain sockets and those under TLS (tunnel/tls.py) go through the same code.
"""

from __future__ import annotations

import socket
import ssl

import trio

from tunnel.net.connection import WOULD_BLOCK, Connection
from tunnel.net.options import tune
from tunnel.tls import TlsSocket

RECV_SIZE = 64 * 1024
TLS_RECORD = 16 * 1024  #: bytes in a record at most (RFC 8446, 5.1)
RECORDS = 16  #: that are read in a row before others have their turn
EAGER = 256 * 1024  #: bytes that may come to a task without a wait before it lets others run
_EAGER_EACH = 4096  #: what a read counts at least: work goes with reads too


class Socket(Connection, trio.abc.HalfCloseableStream):
    """A connected TCP socket, plain or TLS.

    `recv` and `send` are the fast way: no checkpoint when the kernel has an answer at once, but `recv` lets others run
    after EAGER bytes, so that a peer who always has more to say starves nobody. `receive_some` and `send_all` keep
    Trio's whole contract. One task may receive while another sends.
    Raises trio.BrokenResourceError when the connection failed, trio.ClosedResourceError when we closed it.
    """

    __slots__ = ("_eager", "_ended", "_receiving", "_sending")

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._eager = 0
        self._receiving = False
        self._sending = False
        self._ended = False  # our direction

    # Receiving

    def recv_nowait(self, size: int = RECV_SIZE) -> bytes | None:
        """What is there: bytes, b"" at the end, None when nothing is there yet."""
        try:
            return self.sock.recv(size)
        except WOULD_BLOCK:
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
        except WOULD_BLOCK:
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
        except WOULD_BLOCK:
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

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

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
