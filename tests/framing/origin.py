"""A local service on raw sockets that records what arrives, byte for byte, and takes one spelling only.

Anything but the canonical form is a violation: this service is how a naive reader would be, and a strict judge.
"""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
HEAD = re.compile(
    rb"("
    + TOKEN
    + rb" [!-~]+ HTTP/1\.1)\r\n((?:"
    + TOKEN
    + rb": (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\r\n)+)\r\n"
)
SIZE = re.compile(rb"([0-9a-f]{1,15})\r\n")
NONE, COUNTED, CHUNKS = "none", "counted", "chunks"


@dataclass
class Arrived:
    """A request as it came. `whole` once its body has come to its end."""

    first: bytes
    fields: list[bytes]
    framing: str = NONE
    body: bytes = b""
    trailers: bytes = b""
    whole: bool = False


class Origin:
    """requests: in the order of their heads. violations: what was not in canonical form. Close it at the end."""

    def __init__(self) -> None:
        self.requests: list[Arrived] = []
        self.violations: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def whole(self) -> list[Arrived]:
        return [one for one in self.requests if one.whole]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # gone already
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader = _Reader(connection)
        try:
            while (request := self._read(reader)) is not None:
                body = b"" if request.first.startswith(b"HEAD ") else b"ok"
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)
        except EOFError:
            pass  # broken off within a request: the core refused the rest
        except OSError:
            pass
        finally:
            self._open.discard(connection)
            connection.close()

    def _read(self, reader: _Reader) -> Arrived | None:
        """The next request; None at the connection's end or after a violation. Raises EOFError within a request."""
        try:
            head = reader.until(b"\r\n\r\n")
        except EOFError:
            if reader.data:
                self.violations.append(f"bytes that are no head: {reader.data[:200]!r}")
            return None
        match = HEAD.fullmatch(head)
        if match is None:
            self.violations.append(f"a head in another form: {head[:500]!r}")
            return None
        request = Arrived(match[1], match[2].split(b"\r\n")[:-1])
        named = [
            line for line in request.fields if line.lower().startswith((b"content-length:", b"transfer-encoding:"))
        ]
        request.fields = [line for line in request.fields if line not in named]
        self.requests.append(request)
        if not named:
            pass
        elif len(named) == 1 and re.fullmatch(rb"Content-Length: (?:0|[1-9]\d*)", named[0]):
            request.framing = COUNTED
            request.body = reader.exactly(int(named[0][16:]))
        elif named == [b"Transfer-Encoding: chunked"]:
            request.framing = CHUNKS
            if not self._read_chunks(reader, request):
                return None
        else:
            self.violations.append(f"framing in another form: {named!r}")
            return None
        request.whole = True
        return request

    def _read_chunks(self, reader: _Reader, request: Arrived) -> bool:
        while True:
            line = reader.until(b"\r\n")
            match = SIZE.fullmatch(line)
            if match is None:
                self.violations.append(f"a chunk's size in another form: {line!r}")
                return False
            size = int(match[1], 16)
            if not size:
                break
            request.body += reader.exactly(size)
            if reader.exactly(2) != b"\r\n":
                self.violations.append("a chunk does not end with CRLF")
                return False
        while (line := reader.until(b"\r\n")) != b"\r\n":
            request.trailers += line
        return True


class _Reader:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.data = b""

    def _more(self) -> None:
        part = self._connection.recv(65536)
        if not part:
            raise EOFError
        self.data += part

    def until(self, mark: bytes) -> bytes:
        while mark not in self.data:
            self._more()
        return self._cut(self.data.index(mark) + len(mark))

    def exactly(self, size: int) -> bytes:
        while len(self.data) < size:
            self._more()
        return self._cut(size)

    def _cut(self, at: int) -> bytes:
        taken, self.data = self.data[:at], self.data[at:]
        return taken
