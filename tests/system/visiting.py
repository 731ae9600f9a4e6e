"""A visitor on a raw socket, for what HTTP libraries hide or refuse to send.

    visitor = Connection(core.public, "app.localhost")
    answer = visitor.ask("GET /echo", "X-Thing: 1", body=b"…")   # one request, one Answer
    visitor.send(b"GET / HTTP/1.1\\r\\n…"); visitor.read()         # whatever bytes, the next Answer
    answer.status, answer.reason, answer.head, answer.fields, answer["name"], answer.all("name"), answer.body
    answer.trailers, answer.outcome (X-Tunnel-Outcome, "" if the service answered)
    visitor.read_head()                                          # a head alone, e.g. an interim one or a 101
    visitor.ends()                                               # "closed" or "reset" once the core ended it
    visitor.half_close(); visitor.close(); visitor.reset()

Answers that break off raise Broken: its text is "closed" or "reset", `partial` what came of the body.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field


class Broken(Exception):
    """The connection ended within an answer (or before it)."""

    partial = b""


@dataclass
class Answer:
    head: bytes
    status: int
    reason: str
    version: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    framing: str = ""  # "length", "chunked", "end" or "none"
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def __getitem__(self, name: str) -> str:
        """The only value of a field, "" when there is none."""
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else ""

    @property
    def outcome(self) -> str:
        return self["x-tunnel-outcome"]


class Connection:
    """timeout: seconds that any wait for the core may last. source: the address it comes from, "" for any."""

    def __init__(self, address: tuple[str, int], host: str, timeout: float = 10.0, *, source: str = "") -> None:
        self.host = host
        self.buffer = b""
        self.sock = socket.create_connection(address, timeout, (source, 0) if source else None)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sending

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, line: str, *fields: str, body: bytes | None = None, version: str = "1.1") -> bytes:
        """The bytes of a request: "GET /path", fields, a body with its length. Host is ours unless given."""
        lines = [f"{line} HTTP/{version}"]
        if not any(one.lower().startswith("host:") for one in fields):
            lines.append(f"Host: {self.host}")
        lines += fields
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")

    def ask(self, line: str, *fields: str, body: bytes | None = None, version: str = "1.1") -> Answer:
        self.send(self.request(line, *fields, body=body, version=version))
        return self.read(line.split(" ")[0])

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # Reading

    def receive(self) -> bytes:
        """The next bytes. Raises Broken at the end, TimeoutError."""
        if self.buffer:
            data, self.buffer = self.buffer, b""
            return data
        try:
            data = self.sock.recv(256 * 1024)
        except ConnectionError:
            raise Broken("reset") from None
        if not data:
            raise Broken("closed")
        return data

    def until(self, mark: bytes) -> bytes:
        data = b""
        while (end := data.find(mark)) < 0:
            data += self.receive()
        end += len(mark)
        self.buffer = data[end:] + self.buffer
        return data[:end]

    def exactly(self, size: int) -> bytes:
        data = bytearray()
        try:
            while len(data) < size:
                data += self.receive()
        except Broken as exc:
            exc.partial = bytes(data)
            raise
        self.buffer = bytes(data[size:]) + self.buffer
        return bytes(data[:size])

    def read_head(self) -> Answer:
        head = self.until(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")[:-2]
        version, status, reason = lines[0].split(" ", 2)
        return Answer(head, int(status), reason, version, _fields(lines[1:]))

    def read(self, method: str = "GET") -> Answer:
        """The next final answer. Raises Broken with what came of its body."""
        answer = self.read_head()
        while answer.status < 200 and answer.status != 101:
            answer = self.read_head()
        if method == "HEAD" or answer.status in (101, 204, 304):
            answer.framing = "none"
        elif answer["transfer-encoding"]:
            answer.framing = "chunked"
            self._read_chunks(answer)
        elif answer["content-length"]:
            answer.framing = "length"
            answer.body = self.exactly(int(answer["content-length"]))
        else:
            answer.framing = "end"
            answer.body = self._to_end()
        return answer

    def _read_chunks(self, answer: Answer) -> None:
        body = bytearray()
        try:
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                assert self.until(b"\r\n") == b"\r\n"
            lines = []
            while (line := self.until(b"\r\n")) != b"\r\n":
                lines.append(line.decode("latin-1").removesuffix("\r\n"))
        except Broken as exc:
            exc.partial = bytes(body) + exc.partial
            raise
        answer.body, answer.trailers = bytes(body), _fields(lines)

    def _to_end(self) -> bytes:
        body = bytearray()
        while True:
            try:
                body += self.receive()
            except Broken as exc:
                if str(exc) == "closed":
                    return bytes(body)
                exc.partial = bytes(body)
                raise

    def ends(self) -> str:
        """How the core ended the connection, nothing more having come: "closed" or "reset". Raises TimeoutError."""
        try:
            data = self.receive()
        except Broken as exc:
            return str(exc)
        raise AssertionError(f"more came: {data[:200]!r}")


def _fields(lines: list[str]) -> list[tuple[str, str]]:
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
