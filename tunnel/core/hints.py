"""Which worker an agent's new connection is meant for, read without taking a byte of it.

The hint stands where it can be seen before TLS begins: an ALPN name `x-tunnel-worker/N` in the ClientHello (RFC 7301;
RFC 8446, 4.1.2), or on a plain connection the query `worker=N` of the WebSocket handshake's GET. It is a hint and no
more: what cannot be read, or names no worker, is served where it landed, and the agent learns from the WELCOME.
"""

from __future__ import annotations

import re
import socket

import trio

from tunnel.net import Socket

ALPN = b"x-tunnel-worker/"
MAX_PEEK = 16 * 1024 + 5  #: a record of TLS, the longest that is looked at
MAX_NAMES = 16  #: ALPN names that are looked at
_HANDSHAKE, _CLIENT_HELLO, _ALPN_EXTENSION = 22, 1, 16
_QUERY = re.compile(rb"GET [^\s?]*\?(?:[^\s]*&)?worker=(\d{1,4})(?:&[^\s]*)? HTTP/1")


async def wanted_worker(stream: Socket) -> int | None:
    """The worker that the connection's first bytes name; None where they name none. Waits until that is clear."""
    sock = stream.sock
    need = 1
    try:
        while True:
            # epoll says "readable" again and again for bytes that are only looked at, unless it is told how many to
            # wait for
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, need)
            await trio.lowlevel.wait_readable(sock)
            seen = sock.recv(MAX_PEEK, socket.MSG_PEEK)
            if len(seen) < need:  # the other end has closed
                return None
            missing = bytes_missing(seen)
            if not missing or len(seen) + missing > MAX_PEEK:
                return worker_of(seen)
            need = len(seen) + missing
    except OSError:
        return None
    finally:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        except OSError:
            pass


def bytes_missing(seen: bytes) -> int:
    """How many bytes more are needed, at least, to know."""
    if seen[0] == _HANDSHAKE:
        if len(seen) < 5:
            return 5 - len(seen)
        return max(0, 5 + int.from_bytes(seen[3:5], "big") - len(seen))
    return 0 if b"\n" in seen or not b"GET ".startswith(seen[:4]) else 1


def worker_of(seen: bytes) -> int | None:
    """The worker named in the first bytes of a connection, whole record or line."""
    if seen[:1] == bytes((_HANDSHAKE,)):
        for name in alpn_names(seen):
            if name.startswith(ALPN) and name[len(ALPN) :].isdigit() and len(name) < len(ALPN) + 5:
                return int(name[len(ALPN) :])
        return None
    match = _QUERY.match(seen)
    return int(match[1]) if match else None


def alpn_names(record: bytes) -> list[bytes]:
    """The ALPN names in the TLS record that holds a ClientHello; none where it is not one, or is cut off."""
    body = record[5:]
    if body[:1] != bytes((_CLIENT_HELLO,)):
        return []
    at = 4 + 2 + 32  # type and length, version, random
    at = _after(body, at, 1)  # session id
    at = _after(body, at, 2)  # cipher suites
    at = _after(body, at, 1)  # compression methods
    end = min(_after(body, at, 2), len(body))
    at += 2
    while at + 4 <= end:
        kind, size = int.from_bytes(body[at : at + 2], "big"), int.from_bytes(body[at + 2 : at + 4], "big")
        at += 4
        if kind == _ALPN_EXTENSION:
            return _names(body[at + 2 : min(at + size, end)])
        at += size
    return []


def _names(data: bytes) -> list[bytes]:
    names: list[bytes] = []
    at = 0
    while at < len(data) and data[at] and len(names) < MAX_NAMES:  # an empty name is none (RFC 7301, 3.1)
        end = at + 1 + data[at]
        names.append(data[at + 1 : end])
        at = end
    return names


def _after(body: bytes, at: int, width: int) -> int:
    """Where a vector ends whose length stands in `width` bytes at `at`."""
    return at + width + int.from_bytes(body[at : at + width], "big")
