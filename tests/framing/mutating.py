"""Bytes made a little wrong: flips, cuts, repeats, splices, and the words that parsers trip over."""

from __future__ import annotations

import random
from collections.abc import Sequence

WORDS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\0", b":", b": ", b",", b";", b"0", b"5", b"-1", b"0x5",
    b"ffffffffffffffff", b"\r\n ", b"chunked", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\n", b"Upgrade: websocket\r\n",
    b"Host: a\r\n", b"Expect: 100-continue\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\n", b"HTTP/1.1",
    b"HTTP/1.0", b"\x7f", b"\x0b", b"_", b"#", b"\\", b"%00", b"\x80", b"\xff", b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
]  # fmt: skip


def mutate(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """`data` with one to four changes."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        at = chance.randrange(len(made) + 1)
        until = min(len(made), at + chance.choice((1, 1, 2, 4, 16, 64)))
        kind = chance.randrange(8)
        if kind == 0:
            made[at:until] = bytes(chance.randrange(256) for _ in range(until - at))
        elif kind == 1:
            del made[at:until]
        elif kind == 2:
            made[at:at] = made[at:until] * chance.choice((1, 2, 8))
        elif kind == 3 and others:
            other = chance.choice(others)
            cut = chance.randrange(len(other) + 1)
            made[at:] = other[cut:]
        elif kind == 4 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 5 and at < len(made):
            made[at] = (made[at] + chance.choice((1, -1, 32))) % 256
        else:
            made[at:at] = chance.choice(WORDS)
    return bytes(made)
