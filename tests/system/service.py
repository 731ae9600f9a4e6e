"""A local service that does what its path says, byte for byte, on raw sockets: also what no proper server would do.

    service = Service()              # listens on 127.0.0.1, any port; Service(port) on that one again
    service.url, service.port
    service.requests                 # what came whole, as Received: method, target, head (raw), fields, body, size,
                                     # sha256, trailers
    service.begun                    # targets of heads that came, their bodies perhaps not
    service.wait_request("/hang")    # the newest Received for this path (polls)
    service.closed                   # (target, "closed" or "reset", monotonic): connections that ended while it worked
    service.wait_closed("/hang")     # the newest such entry for this path (polls)
    service.connections              # connections that brought a request so far (an agent's probes just connect)
    service.release.set()            # lets every /hold answer
    service.close()

Paths (a query sets the numbers):
    /echo                the body again, with X-Method; keeps the connection (also the answer for unknown paths)
    /head                the raw request head as text
    /status/NNN          that status, with a body where one is allowed
    /redirect            302 to /echo of the Host that came, as an absolute URL
    /headers             odd case, two Set-Cookie, hop-by-hop fields (also one named by Connection)
    /gzip                a compressed body
    /download?size=N     N bytes with Content-Length; /chunked?parts=3&size=10; /close-delimited?size=N
    /upload              "SIZE SHA256" of the body
    /trailers            chunked, with the trailer X-Sum
    /sse?n=5&ms=100      events `data: <monotonic>`, then the end
    /slow?ms=N           the answer after N ms; /hold: the answer after `release`; /hang: none, ever
    /stall               the beginning of an answer, then nothing
    /hints               103 and then 200
    /continue            100 at once, then the body is read; /refuse: 417 before the body; /early-413: 413 before it
    /early-200           200 before the body is read, which is then read and thrown away
    /break-length, /break-chunked, /break-close    half an answer, then the end (the last: a reset)
    /break-head, /garbage, /nothing                no answer that is one
    /upgrade             101 for the protocol asked for, then every byte comes back; half-close is answered
"""

from __future__ import annotations

import gzip
import hashlib
import socket
import struct
import threading
import time
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass, field

from running import poll

KEPT = 1024 * 1024  #: bytes of a body that are kept


@dataclass
class Received:
    """A request as it came."""

    head: bytes
    method: str
    target: str
    version: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    size: int = 0
    sha256: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str:
        """The only value of a field, "" when there is none."""
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else ""

    def number(self, name: str, default: int) -> int:
        query = urllib.parse.parse_qs(self.target.partition("?")[2])
        return int(query[name][0]) if name in query else default


class _Gone(Exception):
    """The connection ended: "closed" or "reset"."""


class Service:
    """Listens from its making until `close`."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Received] = []
        self.begun: list[str] = []
        self.closed: list[tuple[str, str, float]] = []
        self.connections = 0
        self.release = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and reset what is open."""
        self.release.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def wait_request(self, path: str, count: int = 1, timeout: float = 10.0) -> Received:
        """The newest request for this path, once there are `count`."""
        found: list[Received] = poll(
            lambda: (seen := [one for one in self.requests if one.path == path]) and len(seen) >= count and seen,
            f"{count} requests for {path}", timeout,
        )  # fmt: skip
        return found[-1]

    def wait_closed(self, path: str, timeout: float = 10.0) -> tuple[str, str, float]:
        found: list[tuple[str, str, float]] = poll(
            lambda: [one for one in self.closed if one[0].partition("?")[0] == path], f"the end of {path}", timeout
        )
        return found[-1]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        connection = _Connection(self, sock)
        try:
            while connection.answer_one():
                pass
        except _Gone as exc:
            if connection.request is not None:
                self.closed.append((connection.request.target, str(exc), time.monotonic()))
        finally:
            self._open.discard(sock)
            with suppress(OSError):
                sock.close()


class _Connection:
    def __init__(self, service: Service, sock: socket.socket) -> None:
        self.service = service
        self.sock = sock
        self.buffer = b""
        self.request: Received | None = None
        self.counted = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # Bytes

    def receive(self) -> bytes:
        """The next bytes. Raises _Gone."""
        try:
            data = self.sock.recv(256 * 1024)
        except OSError:
            raise _Gone("reset") from None
        if not data:
            raise _Gone("closed")
        return data

    def until(self, mark: bytes) -> bytes:
        while (end := self.buffer.find(mark)) < 0:
            self.buffer += self.receive()
        end += len(mark)
        taken, self.buffer = self.buffer[:end], self.buffer[end:]
        return taken

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            raise _Gone("reset") from None

    def wait_end(self) -> None:
        """Until the other end leaves. Raises _Gone."""
        while True:
            self.receive()

    def watch(self, seconds: float) -> None:
        """Wait, unless the other end leaves. Raises _Gone."""
        self.sock.settimeout(max(seconds, 0.001))
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            return
        except OSError:
            raise _Gone("reset") from None
        finally:
            self.sock.settimeout(None)
        if not data:
            raise _Gone("closed")
        self.buffer += data

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # Requests

    def answer_one(self) -> bool:
        """Serve one request; says whether the connection goes on. Raises _Gone."""
        self.request = None
        head = self.until(b"\r\n\r\n")
        if not self.counted:
            self.counted = True
            self.service.connections += 1
        lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, version = lines[0].split(" ")
        request = Received(head, method, target, version, _fields(lines[1:]))
        self.request = request
        self.service.begun.append(target)
        path = request.path.strip("/").partition("/")[0].replace("-", "_")
        early = getattr(self, f"early_{path}", None)
        if early is not None:
            self.service.requests.append(request)
            return bool(early(request))
        if path == "continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.read_body(request)
        self.service.requests.append(request)
        answer = getattr(self, f"do_{path}", self.do_echo)
        going_on = answer(request) is not False
        return going_on and request.get("connection").lower() != "close"

    def read_body(self, request: Received) -> None:
        digest = hashlib.sha256()

        def take(data: bytes) -> None:
            digest.update(data)
            request.size += len(data)
            if len(request.body) < KEPT:
                request.body += data

        if request.get("transfer-encoding"):
            while size := int(self.until(b"\r\n"), 16):
                self._take(size, take)
                assert self.until(b"\r\n") == b"\r\n"
            lines = []
            while (line := self.until(b"\r\n")) != b"\r\n":
                lines.append(line.decode("latin-1").removesuffix("\r\n"))
            request.trailers = _fields(lines)
        else:
            self._take(int(request.get("content-length") or 0), take)
        request.sha256 = digest.hexdigest()

    def _take(self, size: int, take) -> None:  # type: ignore[no-untyped-def]
        while size:
            part = self.buffer or self.receive()
            self.buffer = part[size:]
            part = part[:size]
            size -= len(part)
            take(part)

    # Answers

    def reply(self, body: bytes, *fields: str, status: str = "200 OK") -> None:
        lines = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]
        head_only = self.request is not None and self.request.method == "HEAD"
        self.send("\r\n".join(lines).encode("latin-1") + (b"" if head_only else body))

    def do_echo(self, request: Received) -> None:
        self.reply(request.body, f"X-Method: {request.method}", "Content-Type: application/octet-stream")

    def do_head(self, request: Received) -> None:
        self.reply(request.head, "Content-Type: text/plain")

    def do_status(self, request: Received) -> None:
        status = request.path.rpartition("/")[2]
        if status in ("204", "304"):
            self.send(f'HTTP/1.1 {status} Nothing\r\nETag: "x"\r\n\r\n'.encode())
        else:
            self.reply(f"status {status}\n".encode(), "Content-Type: text/plain", status=f"{status} Own Words")

    def do_redirect(self, request: Received) -> None:
        self.reply(b"", f"Location: http://{request.get('host')}/echo", status="302 Found")

    def do_headers(self, request: Received) -> None:
        self.reply(
            b"fields", "X-oDD-cAsE: Yes", "Set-Cookie: a=1; Path=/", "set-cookie: b=2", "Zeta: 1", "Alpha: 2",
            "Connection: keep-alive, X-Private", "X-Private: secret", "Keep-Alive: timeout=5", "X-Tunnel-Outcome: fake",
            "Proxy-Authenticate: Basic", "X-Request-Id: not-yours",
        )  # fmt: skip

    def do_gzip(self, request: Received) -> None:
        self.reply(gzip.compress(b"squeezed " * 100, mtime=0), "Content-Encoding: gzip", "Content-Type: text/plain")

    def do_download(self, request: Received) -> None:
        size = request.number("size", 1000)
        self.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        if request.method != "HEAD":
            self._pour(size)

    def do_close_delimited(self, request: Received) -> bool:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        self._pour(request.number("size", 1000))
        return False

    def _pour(self, size: int) -> None:
        block = bytes(range(256)) * 256
        while size:
            self.send(block[:size])
            size -= min(size, len(block))

    def do_chunked(self, request: Received) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        size = request.number("size", 10)
        for number in range(request.number("parts", 3)):
            self.send(b"%x\r\n%b\r\n" % (size, (b"%d" % (number % 10)) * size))
        self.send(b"0\r\n\r\n")

    def do_upload(self, request: Received) -> None:
        self.reply(f"{request.size} {request.sha256}".encode())

    def do_trailers(self, request: Received) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n4\r\nbody\r\n0\r\n")
        self.send(b"X-Sum: 42\r\n\r\n")

    def do_sse(self, request: Received) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(request.number("n", 5)):
            event = f"data: {time.monotonic():.6f}\n\n".encode()
            self.send(b"%x\r\n%b\r\n" % (len(event), event))
            self.watch(request.number("ms", 100) / 1000)
        self.send(b"0\r\n\r\n")

    def do_slow(self, request: Received) -> None:
        self.watch(request.number("ms", 100) / 1000)
        self.reply(b"slow", "Content-Type: text/plain")

    def do_hold(self, request: Received) -> None:
        while not self.service.release.is_set():
            self.watch(0.02)
        self.reply(b"held", "Content-Type: text/plain")

    def do_hang(self, request: Received) -> None:
        self.wait_end()

    def do_stall(self, request: Received) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhello")
        self.wait_end()

    def do_hints(self, request: Received) -> None:
        self.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
        self.reply(b"after the hints")

    def do_upgrade(self, request: Received) -> bool:
        protocol = request.get("upgrade")
        self.send(f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode())
        self.send(self.buffer)
        while True:
            try:
                self.send(self.receive())
            except _Gone as exc:
                if str(exc) == "reset":
                    raise
                self.service.closed.append((request.target, "closed", time.monotonic()))
                self.send(b"bye")
                return False

    def do_break_length(self, request: Received) -> bool:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
        return False

    def do_break_chunked(self, request: Received) -> bool:
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        return False

    def do_break_close(self, request: Received) -> bool:
        self.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500)
        self.watch(0.3)  # a reset overtakes what was not read yet
        self.reset()
        return False

    def do_break_head(self, request: Received) -> bool:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Le")
        return False

    def do_garbage(self, request: Received) -> bool:
        self.send(b"220 mail.example ESMTP\r\n\r\n")
        return False

    def do_nothing(self, request: Received) -> bool:
        return False

    # Answers before the body was read

    def early_refuse(self, request: Received) -> bool:
        self.reply(b"no such expectation", "Connection: close", status="417 Expectation Failed")
        return False

    def early_early_413(self, request: Received) -> bool:
        self.reply(b"too much", "Connection: close", status="413 Content Too Large")
        self.sock.shutdown(socket.SHUT_WR)
        with suppress(_Gone):
            self.wait_end()
        return False

    def early_early_200(self, request: Received) -> bool:
        self.reply(b"early")
        self.read_body(request)
        return True


def _fields(lines: list[str]) -> list[tuple[str, str]]:
    return [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
