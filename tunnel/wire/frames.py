"""Frames: the ten-byte header, the fixed parts of payloads, and their limits. SPEC.md says what they mean.

Everything is big-endian. A WebSocket message carries one or many frames, back to back, never a part of one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from tunnel.errors import WireError

VERSION = 1

# Frame types.
HELLO, WELCOME, REFUSED = 1, 2, 3
OPEN, RESPONSE, DATA, TRAILERS, RESET, WINDOW = 4, 5, 6, 7, 8, 9
PING, PONG, GOAWAY, REPORT = 10, 11, 12, 13
WAITING = 14
NAMES = {
    1: "HELLO", 2: "WELCOME", 3: "REFUSED", 4: "OPEN", 5: "RESPONSE", 6: "DATA", 7: "TRAILERS", 8: "RESET",
    9: "WINDOW", 10: "PING", 11: "PONG", 12: "GOAWAY", 13: "REPORT",
    14: "WAITING",
}  # fmt: skip

END = 0x01  #: flag: the sender sends nothing more on this stream

# What an OPEN opens.
HTTP, UPGRADE, TCP, PROBE = 0, 1, 2, 3
PROTOCOLS = ("http", "upgrade", "tcp", "probe")

# Body lengths that are no number of bytes.
NO_BODY = -1  #: none was declared
UNKNOWN = -2  #: there is one; its end is marked by END

HEADER = struct.Struct("!BBII")  # type, flags, stream, payload length
OPEN_HEAD = struct.Struct("!BxHIqHI")  # protocol, tunnel, deadline ms, body length, context length, head length
RESPONSE_HEAD = struct.Struct("!HxxqIII")  # status, body length, agent µs, local µs, head length
RESET_HEAD = struct.Struct("!B")  # outcome code; text follows
WINDOW_BODY = struct.Struct("!I")  # bytes of credit
WAITING_BODY = struct.Struct("!II")  # agent µs, local µs
PING_BODY = struct.Struct("!Qq")  # token, sender's wall clock in µs
PONG_BODY = struct.Struct("!Qqq")  # token, the ping's wall clock, the answerer's wall clock, µs

MAX_PAYLOAD = 256 * 1024
MAX_TALK = 64 * 1024  #: HELLO, WELCOME, REFUSED, GOAWAY, REPORT
MAX_ATTACHING = 96 * 1024  #: what the core reads of a connection before its WELCOME, WebSocket handshake included
MAX_MESSAGE = 1024 * 1024
MAX_FRAMES = 4096  #: in one message: each costs work, however small it is
MAX_DATA = 64 * 1024  #: one DATA frame; larger bodies are cut and interleaved
MAX_HEAD = 128 * 1024  #: request or response head in a frame
MAX_TRAILERS = 16 * 1024
MAX_CONTEXT = 16 * 1024
MAX_TEXT = 1024  #: reason text in RESET and GOAWAY
MAX_INTERIMS = 32  #: interim responses of a stream that wait to be taken
SMALL_BODY = 16 * 1024  #: a body up to this size rides in the OPEN or RESPONSE frame
STREAM_WINDOW = 1024 * 1024
LINK_WINDOW = 32 * 1024 * 1024
LEAST_WINDOW = 64 * 1024  #: the smallest that a WELCOME may name
MOST_WINDOW = 2**31 - 1
MOST_US = 2**32 - 1  #: an exchange may take longer than the 71 minutes that fit


class Open(msgspec.Struct, frozen=True, gc=False):
    """An OPEN's payload. `head`: request line and fields, each line ended by CRLF, no empty line, no framing fields."""

    protocol: int
    tunnel: int
    deadline_ms: int
    length: int
    context: bytes
    head: bytes


class Response(msgspec.Struct, frozen=True, gc=False):
    """A RESPONSE's payload. `head`: reason phrase, CRLF, then fields as in Open."""

    status: int
    length: int
    agent_us: int
    local_us: int
    head: bytes


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, stream, len(payload)) + payload


def split(message: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of each frame in a message. Raises WireError on anything that is not whole."""
    at, size = 0, len(message)
    left = MAX_FRAMES
    while at < size:
        left -= 1
        if left < 0:
            raise WireError("there are too many frames in a message")
        if size - at < 10:
            raise WireError("a frame header is cut off")
        kind, flags, stream, length = HEADER.unpack_from(message, at)
        at += 10
        end = at + length
        if length > MAX_PAYLOAD or end > size:
            raise WireError(f"a {NAMES.get(kind, kind)} frame of {length} bytes is too long for its message")
        yield kind, flags, stream, message[at:end]
        at = end


def pack_open(opened: Open, body: bytes = b"") -> bytes:
    context, head = opened.context, opened.head
    fixed = OPEN_HEAD.pack(opened.protocol, opened.tunnel, opened.deadline_ms, opened.length, len(context), len(head))
    return b"".join((fixed, context, head, body))


def unpack_open(payload: bytes) -> tuple[Open, bytes]:
    """The opening and the part of the body that came with it."""
    if len(payload) < OPEN_HEAD.size:
        raise WireError("an OPEN frame is cut off")
    protocol, tunnel, deadline, length, context_size, head_size = OPEN_HEAD.unpack_from(payload)
    at = OPEN_HEAD.size + context_size
    end = at + head_size
    if protocol >= len(PROTOCOLS) or length < UNKNOWN or end > len(payload):
        raise WireError("an OPEN frame does not fit its own lengths")
    if head_size > MAX_HEAD or context_size > MAX_CONTEXT:
        raise WireError("an OPEN frame's head is too long")
    return Open(protocol, tunnel, deadline, length, payload[OPEN_HEAD.size : at], payload[at:end]), payload[end:]


def pack_response(response: Response, body: bytes = b"") -> bytes:
    head = response.head
    agent_us, local_us = min(response.agent_us, MOST_US), min(response.local_us, MOST_US)
    fixed = RESPONSE_HEAD.pack(response.status, response.length, agent_us, local_us, len(head))
    return b"".join((fixed, head, body))


def unpack_response(payload: bytes) -> tuple[Response, bytes]:
    """The answer's head and the part of the body that came with it."""
    if len(payload) < RESPONSE_HEAD.size:
        raise WireError("a RESPONSE frame is cut off")
    status, length, agent_us, local_us, head_size = RESPONSE_HEAD.unpack_from(payload)
    end = RESPONSE_HEAD.size + head_size
    if not 100 <= status <= 999 or length < UNKNOWN or end > len(payload) or head_size > MAX_HEAD:
        raise WireError("a RESPONSE frame does not fit its own lengths")
    return Response(status, length, agent_us, local_us, payload[RESPONSE_HEAD.size : end]), payload[end:]


def is_interim(status: int) -> bool:
    """100 to 199 except 101: another head follows (RFC 9110, 15.2)."""
    return status < 200 and status != 101
