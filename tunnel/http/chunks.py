"""Chunked bodies (RFC 9112, 7.1), of visitors and of local services.

What is read here is written anew for the other side, so only one thing matters: that nobody else would find another
end. h11 ends lines of trailers at a bare LF and takes spaces and twenty digits behind a size; others differ. Here a
line ends with CRLF, a size has up to fifteen hexadecimal digits, extensions are bounded and dropped. Old servers pad
the size with spaces: that is taken from local services, not from visitors.
"""

from __future__ import annotations

import re

import trio

from tunnel.errors import Failure
from tunnel.http.heads import TOKEN, check_trailers

MAX_LINE = 1024  #: bytes of one size line, its extension included
MAX_EXTENSIONS = 16 * 1024  #: bytes of all extensions of a body: they cost work and say nothing
MAX_TRAILERS = 16 * 1024
STEPS = 1000  #: of the reader in one call: three for each chunk

_REST = rb"(;[\t -~\x80-\xff]*)?\r\n"
_SIZE = {"bad_request": re.compile(rb"([0-9A-Fa-f]{1,15})" + _REST)}
_SIZE["local_broken"] = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*" + _REST)
_BEGUN = re.compile(rb"[0-9A-Fa-f]{0,15}(?:[\t ]*|[\t ]*;[\t -~\x80-\xff]*)\r?")  # a line that is not whole yet
_FIELDS = re.compile(rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
_FRAMING = re.compile(rb"(?i)(?:^|\n)(?:content-length|transfer-encoding):")
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_WHOSE = {"bad_request": "the request's body is malformed", "local_broken": "the local service's chunks are malformed"}


class Chunks:
    """outcome: of what is malformed, "bad_request" for a visitor's body, "local_broken" for a local service's.

    `trailers` (as they travel, without those that must not be there) and `rest` are valid once it has `ended`.
    is_behind: there were so many chunks that not all have been looked at; the next call goes on with them.
    """

    __slots__ = (
        "_extensions",
        "_held",
        "_left",
        "_outcome",
        "_size",
        "_state",
        "ended",
        "is_behind",
        "rest",
        "trailers",
    )

    def __init__(self, outcome: str = "local_broken") -> None:
        self.ended = False
        self.is_behind = False
        self.trailers = b""
        self.rest = b""
        self._outcome = outcome
        self._size = _SIZE[outcome]
        self._state = self._read_size
        self._held = b""  # the beginning of a line
        self._left = 0  # bytes of the present chunk
        self._extensions = 0

    async def read(self, data: bytes) -> bytes:
        """The body in `data`, joined. Others run in between where it takes long. Raises Failure."""
        parts = self.feed(data)
        while self.is_behind:
            await trio.lowlevel.checkpoint()
            parts += self.feed(b"")
        return b"".join(parts)

    def feed(self, data: bytes) -> list[bytes]:
        """The body's parts in `data`, or the first of them (`is_behind`). Raises Failure."""
        if self._held:
            data, self._held = self._held + data, b""
        parts: list[bytes] = []
        at = 0
        for _ in range(STEPS):
            after = self._state(data, at, parts)
            if after < 0:
                self.is_behind = False
                return parts
            at = after
        self._held = data[at:]
        self.is_behind = True
        return parts

    # The states. Each reads from `at` and returns where the next one begins, or -1 when it wants more or all is over.

    def _read_size(self, data: bytes, at: int, parts: list[bytes]) -> int:
        match = self._size.match(data, at)
        if match is None:
            begun = data[at : at + MAX_LINE + 1]
            if len(begun) > MAX_LINE or _BEGUN.fullmatch(begun) is None:
                raise self._failure("a size")
            self._held = begun
            return -1
        end = match.end()
        self._extensions += end - match.end(1) - 2
        if end - at > MAX_LINE or self._extensions > MAX_EXTENSIONS:
            raise self._failure("too long an extension")
        self._left = int(match[1], 16)
        self._state = self._read_data if self._left else self._read_trailers
        return end

    def _read_data(self, data: bytes, at: int, parts: list[bytes]) -> int:
        part = data[at : at + self._left]
        if part:
            parts.append(part)
            self._left -= len(part)
        if self._left:
            return -1
        self._state = self._read_end
        return at + len(part)

    def _read_end(self, data: bytes, at: int, parts: list[bytes]) -> int:
        end = data[at : at + 2]
        if end == b"\r\n":
            self._state = self._read_size
            return at + 2
        if end not in (b"", b"\r"):
            raise self._failure("the end of a chunk")
        self._held = end
        return -1

    def _read_trailers(self, data: bytes, at: int, parts: list[bytes]) -> int:
        if data.startswith(b"\r\n", at):
            end = at
        else:
            end = data.find(b"\r\n\r\n", at) + 2
            block = data[at:end] if end >= 2 else data[at : at + MAX_TRAILERS + 1]
            if len(block) > MAX_TRAILERS:
                raise self._failure("too many trailer fields")
            if _BARE.search(block) is not None or (end >= 2 and _FIELDS.fullmatch(block) is None):
                raise self._failure("a trailer field")
            if end < 2:
                self._held = block
                return -1
            if self._outcome == "bad_request" and _FRAMING.search(block) is not None:
                raise self._failure("framing in a trailer")  # to a reader that takes trailers for fields
            lines = map(_normal, block.split(b"\r\n")[:-1])
            self.trailers = b"".join(line for line in lines if check_trailers(line))
            if len(self.trailers) > MAX_TRAILERS:  # as they travel, with a space in each line
                raise self._failure("too many trailer fields")
        self.rest = data[end + 2 :]
        self.ended = True
        self._state = self._is_over
        return -1

    def _is_over(self, data: bytes, at: int, parts: list[bytes]) -> int:
        self.rest += data
        return -1

    def _failure(self, what: str) -> Failure:
        return Failure(self._outcome, f"{_WHOSE[self._outcome]} ({what})")


def _normal(line: bytes) -> bytes:
    name, _, value = line.partition(b":")
    return name + b": " + value.strip(b"\t ") + b"\r\n"
