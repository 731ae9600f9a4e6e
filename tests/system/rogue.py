"""An agent that is out for harm, on a raw socket: it attaches as it should, then says what a test wants.

rogue = Rogue(core, token, "evil")       # a core with -agent-tls=false; it has been welcomed
rogue.send(frame, frame, …)              # one message; Rogue.write(bytes) for what is no message
rogue.frames()                           # (kind, flags, stream, payload) of what comes next, waits for some
rogue.end()                              # (code, reason) of the WebSocket close, (0, "reset" or "closed") without
"""

from __future__ import annotations

import json
import os
import socket
import time

from running import RunningCore

from tunnel.wire import frames

UPGRADE = (
    b"GET /link HTTP/1.1\r\nHost: core\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
Frame = tuple[int, int, int, bytes]


def masked(message: bytes, first: int = 0x82) -> bytes:
    """A client's WebSocket frame, under a mask that changes nothing."""
    size = len(message)
    if size < 126:
        return bytes((first, 0x80 | size)) + bytes(4) + message
    if size < 65536:
        return bytes((first, 0xFE)) + size.to_bytes(2, "big") + bytes(4) + message
    return bytes((first, 0xFF)) + size.to_bytes(8, "big") + bytes(4) + message


class Rogue:
    """token, names: of the hello; without a token it only shakes hands."""

    def __init__(self, core: RunningCore, token: str = "", *names: str, timeout: float = 10.0) -> None:
        self._buffer = b""
        self._timeout = timeout
        self._ready: list[Frame] = []
        self._close: tuple[int, str] | None = None
        self.sock = socket.create_connection(core.agents, timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(UPGRADE)
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        if token:
            self.send(self.hello(token, *names))
            kind, _, _, payload = self.frames()[0]
            assert kind == frames.WELCOME, payload
            self._ready.clear()

    @staticmethod
    def hello(token: str, *names: str) -> bytes:
        tunnels = [{"name": name} for name in names]
        said = {"versions": [1], "agent_version": "0", "agent_id": "rogue", "token": token, "tunnels": tunnels}
        return frames.frame(frames.HELLO, 0, json.dumps({**said, "instance": os.urandom(8).hex()}).encode())

    def send(self, *parts: bytes) -> None:
        self.write(masked(b"".join(parts)))

    def write(self, data: bytes) -> None:
        """Whatever bytes; that the core has closed meanwhile is for `end` to tell."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def frames(self) -> list[Frame]:
        """What has come and was not taken; at least one, pings and their answers aside."""
        deadline = time.monotonic() + self._timeout
        while not self._ready and self._close is None:
            assert time.monotonic() < deadline, "nothing but pings comes"
            self._read()
        found, self._ready = self._ready, []
        assert found, self._close
        return found

    def wait_open(self) -> int:
        """The number of the next stream that the core opens."""
        while True:
            for kind, _, stream, _ in self.frames():
                if kind == frames.OPEN:
                    return stream

    def end(self) -> tuple[int, str]:
        deadline = time.monotonic() + self._timeout
        while self._close is None:
            assert time.monotonic() < deadline, "the core does not end the link"
            self._read()
        self.sock.close()
        return self._close

    def _receive(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionAbortedError
        return data

    def _read(self) -> None:
        try:
            self._buffer += self._receive()
        except ConnectionResetError:
            self._close = (0, "reset")
        except ConnectionAbortedError:
            self._close = (0, "closed")
        while (found := self._cut()) is not None:
            first, payload = found
            if first == 0x88:
                self._close = (int.from_bytes(payload[:2], "big"), payload[2:].decode())
                return
            if first == 0x82:
                for one in frames.split(payload):
                    if one[0] == frames.PING:
                        stamp = int(time.time() * 1e6).to_bytes(8, "big")
                        self.send(frames.frame(frames.PONG, 0, one[3] + stamp))
                    elif one[0] != frames.PONG:
                        self._ready.append(one)

    def _cut(self) -> tuple[int, bytes] | None:
        data = self._buffer
        if len(data) < 2:
            return None
        size, at = data[1] & 0x7F, 2
        if size >= 126:
            at = 4 if size == 126 else 10
            if len(data) < at:
                return None
            size = int.from_bytes(data[2:at], "big")
        if len(data) < at + size:
            return None
        self._buffer = data[at + size :]
        return data[0], data[at : at + size]
