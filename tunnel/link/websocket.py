"""WebSocket's frames (RFC 6455, 5.2), as far as they are ours: a whole binary message is put into one frame, and such
frames are cut out of a byte stream. All others, and whatever is wrong, are left to trio-websocket.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from tunnel.wire.frames import MAX_MESSAGE

try:
    from websockets.speedups import apply_mask
except ImportError:  # no wheel for this platform
    from websockets.utils import apply_mask

OPCODE_BINARY = 0x02
CLOSE = 0x88
PING = 0x89
PINGS = (PING, 0x8A)  #: ping and pong, which may stand anywhere
FIN = 0x80
MASKED = 0x80
MASKS = 64  #: masking keys taken from the system's source at once (RFC 6455, 5.3: unpredictable, each used once)
TURN = 1024  #: messages and frames in them that are dealt with in a row; then others have their turn

OnMessage = Callable[[bytes], int | None]  #: returns how many frames were in it, if it knows


class Framing:
    """client: this end masks its frames, and the other does not."""

    def __init__(self, client: bool) -> None:
        self.on_message: OnMessage | None = None
        self.is_closing = False  # trio-websocket is saying its close
        self._client = client
        self._parts: list[bytes] = []  # of a message that is not whole yet
        self._have = 0  # bytes in them
        self._need = 0  # bytes at which it is whole, as far as is known
        self._is_behind = False  # whole messages may be in `_parts`: the turn was over
        self._aside = False
        self._masks = b""  # random, not used yet

    def _frame(self, message: bytes, first: int = FIN | OPCODE_BINARY) -> bytes:
        size = len(message)
        mask_bit = MASKED if self._client else 0
        if size < 126:
            head = bytes((first, mask_bit | size))
        elif size < 65536:
            head = struct.pack("!BBH", first, mask_bit | 126, size)
        else:
            head = struct.pack("!BBQ", first, mask_bit | 127, size)
        if not self._client:
            return head + message
        if not self._masks:
            self._masks = os.urandom(4 * MASKS)
        key, self._masks = self._masks[:4], self._masks[4:]
        return b"".join((head, key, apply_mask(message, key)))

    def _add(self, data: bytes) -> bytes:
        """As `_cut`, with what is left from before. It is joined once, when a message is whole: one that comes in tiny
        pieces must not be copied for each."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return b""
            data, self._parts = b"".join(self._parts), []
        return self._cut(data)

    def _cut(self, data: bytes) -> bytes:
        """Deliver the whole binary messages in `data`; returns what is trio-websocket's, raw.

        After a turn's work the rest waits for the next call, `_is_behind`.

        Of several pings the last is enough (RFC 6455, 5.5.3). None behind our close: trio-websocket would break on it,
        as on one that it comes to after its close in the same piece.
        """
        assert self.on_message is not None
        others: list[bytes] = []
        ping = b""
        at, size, need = 0, len(data), 0
        left = TURN
        self._is_behind = False
        while size - at >= 2:
            first, second = data[at], data[at + 1]
            length, start = second & 0x7F, at + 2
            if length == 126:
                start += 2
                if start > size:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length == 127:
                start += 8
                if start > size:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
            masked = second & MASKED
            if masked:
                start += 4
            end = start + length
            good = bool(masked) != self._client and length <= (125 if first in PINGS else MAX_MESSAGE)
            ours = first == FIN | OPCODE_BINARY
            if not good or (not ours and first not in PINGS):
                self._aside = True
                others.append(data[at:])
                at = size
                break
            if end > size:
                need = end - at
                break
            if left <= 0:
                self._is_behind = True
                break
            if ours:
                if masked:
                    count = self.on_message(apply_mask(memoryview(data)[start:end], data[start - 4 : start]))
                else:
                    count = self.on_message(data[start:end])
                left -= 1 + (count or 0)
            elif first == PING:
                ping = data[at:end]
                left -= 1
            else:
                others.append(data[at:end])
                left -= 1
            at = end
        if at < size:
            self._parts, self._have, self._need = [data[at:]], size - at, need
        if ping and not self.is_closing:
            others.insert(0, ping)  # before what ends the connection, if that is here too
        return b"".join(others)
