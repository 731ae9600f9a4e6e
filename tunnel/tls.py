"""TLS on a non-blocking socket, in bounded bites.

`ssl.SSLSocket` lets OpenSSL read the connection itself, and one read goes on for as long as records come that carry no
data. TLS 1.3 allows any number of those (KeyUpdate, RFC 8446, 4.6.3): a peer who sends nothing else, before it has said
who it is, would keep the whole run loop in a single call. So the bytes are read here, BITE by BITE, and a peer that
sends more than MOST_SILENT bytes without any data among them is cut off.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

BITE = 16 * 1024  #: bytes that OpenSSL is given at a time
MOST_SILENT = 48 * 1024  #: bytes without data in them: a record of data and what belongs to it has 16.4 KiB at most
MOST_HANDSHAKE = 256 * 1024  #: bytes of a handshake, chains of certificates included


class TlsSocket(socket.socket):
    """Takes the place of a connected, non-blocking socket. Calls and errors are those of `ssl.SSLSocket`, as far as
    they are here: who would have to wait gets ssl.SSLWantReadError or ssl.SSLWantWriteError.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_name: str = ""
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=None if server_side else server_name,
        )
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.setblocking(False)
        self._unsent = b""  # records that the kernel has not taken yet
        self._owed = 0  # bytes that are in them, though `send` did not say so
        self._silent = 0  # bytes read since the last data
        self._has_ended = False
        self._is_up = False  # data has come and no end, so that OpenSSL waits for nothing but more
        self._early = b""  # data that was read while our end was said

    def do_handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                self._silent = 0
                return
            except ssl.SSLWantReadError:
                self._flush()
                self._bite(MOST_HANDSHAKE)
            finally:
                self._flush_quietly()

    def getpeercert(self) -> bytes | None:
        """The other end's certificate, DER."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def has_waiting(self) -> bool:
        """Whether there are bytes here, of which the kernel does not tell again."""
        return bool(self._early or self._tls.pending() or self._incoming.pending)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """What one record brings; b"" at the end, also at one without a close_notify."""
        if self._early:
            data, self._early = self._early[:size], self._early[size:]
            return data
        if self._is_up and not (self._incoming.pending or self._has_ended or self._tls.pending()):
            self._bite(MOST_SILENT)  # first: OpenSSL has nothing, and says so at a price
        while True:
            try:
                data = self._tls.read(size)
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self._flush_quietly()
                self._bite(MOST_SILENT)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                self._is_up = False
                return b""
            except ssl.SSLError:
                self._flush_quietly()  # an alert
                raise
            else:
                self._silent, self._is_up = 0, bool(data)
                return data

    def _bite(self, most: int) -> None:
        """Give OpenSSL some of what has come. Raises ssl.SSLWantReadError when nothing has, ConnectionError."""
        if self._has_ended:
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection has ended")
        if self._silent > most:
            raise ConnectionAbortedError(errno.ECONNABORTED, "too many TLS records without data")
        try:
            data = super().recv(BITE)
        except BlockingIOError:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "nothing has come") from None
        self._silent += len(data)
        if data:
            self._incoming.write(data)
        else:
            self._has_ended = True
            self._incoming.write_eof()

    def send(self, data: Any, flags: int = 0) -> int:
        """How many bytes are on their way, a record's at most. Until the kernel has taken all of a record, its last
        byte counts as not sent: it has to be offered again, first of what is sent next."""
        if self._unsent or self._outgoing.pending:
            self._flush()
        sent = self._owed
        if len(data) > sent:
            sent += self._write(memoryview(data)[sent:] if sent else data)
            self._flush_quietly()
        self._owed = 0
        if self._unsent:
            self._owed = 1
            if sent == 1:
                raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "the kernel takes no more")
            sent -= 1
        return sent

    def _write(self, data: bytes | memoryview) -> int:
        while True:
            try:
                return self._tls.write(data)
            except ssl.SSLWantReadError:  # the handshake comes first
                self._flush()
                self._bite(MOST_HANDSHAKE)

    def unwrap(self) -> None:
        """Send a close_notify; the other end's is not waited for (then ssl.SSLWantReadError is raised), and what it
        still sends can be read. OpenSSL looks for its close_notify at once, and would throw away what it finds instead.
        """
        self._flush()
        try:
            while data := self._tls.read(BITE):
                self._early += data
        except ssl.SSLError:  # nothing more is here, nearly always; any other shows itself to who reads
            pass
        try:
            self._tls.unwrap()
        finally:
            self._flush()

    def _flush(self) -> None:
        """Raises ssl.SSLWantWriteError while the kernel does not take all, OSError."""
        data = self._unsent + self._outgoing.read() if self._outgoing.pending else self._unsent
        if not data:
            return
        try:
            self._unsent = data[super().send(data) :]
        except BlockingIOError:
            self._unsent = data
        if self._unsent:
            raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "the kernel takes no more")

    def _flush_quietly(self) -> None:
        """What can't leave now leaves with what is sent next; a broken connection shows itself there, too."""
        try:
            self._flush()
        except OSError:
            pass
