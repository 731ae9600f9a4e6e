"""PROXY protocol headers: read to the byte, refused when odd, believed only from where they are expected."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from struct import pack

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tunnel.core.proxied import MAX_V1, MAX_V2, Behind, ProxyHeaderError, ProxyHeaders, read_header
from tunnel.link.tasks import open_pair
from tunnel.net import Socket

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
FOUR = ip_address("192.0.2.1").packed + ip_address("198.51.100.1").packed + pack(">HH", 56324, 443)
SIX = ip_address("2001:db8::1").packed + ip_address("2001:db8::2").packed + pack(">HH", 56324, 443)


def v2(rest: bytes = FOUR, version: int = 0x21, family: int = 0x11, size: int | None = None) -> bytes:
    return SIGNATURE + bytes((version, family)) + pack(">H", len(rest) if size is None else size) + rest


def tlv(kind: int, value: bytes) -> bytes:
    return pack(">BH", kind, len(value)) + value


async def read(data: bytes, *, dribble: bool = False, end: bool = True) -> tuple[Behind, bytes]:
    """What a header says, and what is left on the connection after it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = Socket(ours)
    with theirs:
        async with open_pair() as nursery:

            async def send() -> None:
                size = 1 if dribble else max(len(data), 1)
                for at in range(0, len(data), size):
                    theirs.send(data[at : at + size])
                    await trio.testing.wait_all_tasks_blocked()
                if end:
                    theirs.shutdown(socket.SHUT_WR)

            nursery.start_soon(send)
            try:
                behind = await read_header(stream)
                left = b""
                while part := await stream.recv():
                    left += part
            finally:
                nursery.cancel_scope.cancel()
                stream.close()
    return behind, left


GOOD = {
    "v1 IPv4": (b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", Behind("192.0.2.1")),
    "v1 IPv6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n", Behind("2001:db8::1")),
    "v1 IPv4 in IPv6": (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", Behind("192.0.2.1")),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", Behind()),
    "v1 unknown with more": (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", Behind()),
    "v2 IPv4": (v2(), Behind("192.0.2.1")),
    "v2 IPv6": (v2(SIX, family=0x21), Behind("2001:db8::1")),
    "v2 Unix": (v2(b"/run/x".ljust(216, b"\0"), family=0x31), Behind()),
    "v2 unspecified": (v2(b"", family=0), Behind()),
    "v2 local": (v2(b"", version=0x20, family=0), Behind()),
    "v2 local with addresses": (v2(version=0x20), Behind()),
    "v2 over TLS": (v2(FOUR + tlv(0x20, b"\x01\0\0\0\0")), Behind("192.0.2.1", True)),
    "v2 not over TLS": (v2(FOUR + tlv(0x20, b"\0\0\0\0\0")), Behind("192.0.2.1")),
    "v2 with other extensions": (v2(FOUR + tlv(1, b"h2") + tlv(0x20, b"\x01\0\0\0\0")), Behind("192.0.2.1", True)),
    "v2 with a broken extension": (v2(FOUR + b"\x20\xff\xff\x01"), Behind("192.0.2.1")),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dribble", [False, True], ids=["at once", "byte by byte"])
async def test_what_a_header_says(name: str, dribble: bool) -> None:
    header, expected = GOOD[name]
    behind, left = await read(header + b"GET / HTTP/1.1\r\n\r\n", dribble=dribble)
    assert behind == expected
    assert left == b"GET / HTTP/1.1\r\n\r\n"


BAD = {
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower case": b"proxy TCP4 192.0.2.1 198.51.100.1 56324 443\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,
    "nothing": b"",
    "half of it": b"PROXY TCP4 192.0.2.1",
    "an address with a zone": b"PROXY TCP6 ::1%\tevil ::2 1 2\r\n",
    "no CR": b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\n" + b"x" * 200,
    "too long": b"PROXY UNKNOWN " + b"x" * MAX_V1 + b"\r\n",
    "another family": b"PROXY UDP4 192.0.2.1 198.51.100.1 56324 443\r\n",
    "no number": b"PROXY TCP4 192.0.2.1 198.51.100.1 port 443\r\n",
    "too large a port": b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 443\r\n",
    "no address": b"PROXY TCP4 somebody 198.51.100.1 56324 443\r\n",
    "an address of the other family": b"PROXY TCP4 ::1 ::1 56324 443\r\n",
    "two blanks": b"PROXY TCP4  192.0.2.1 198.51.100.1 56324 443\r\n",
    "too few words": b"PROXY TCP4 192.0.2.1 198.51.100.1 56324\r\n",
    "v2 version": v2(version=0x11),
    "v2 command": v2(version=0x22),
    "v2 too short": v2(FOUR[:8]),
    "v2 too long": v2(size=MAX_V2 + 1),
    "v2 broken off": v2(size=100),
}


@pytest.mark.parametrize("name", BAD)
async def test_odd_headers_are_refused(name: str) -> None:
    with pytest.raises(ProxyHeaderError, match=r"^it"):
        await read(BAD[name])


@given(st.sampled_from(list(GOOD.values())), st.binary(max_size=6), st.integers(0, 60), st.integers(0, 6))
def test_no_bytes_do_more_than_be_refused(good: tuple[bytes, Behind], new: bytes, at: int, cut: int) -> None:
    header = good[0][:at] + new + good[0][at + cut :]

    async def run() -> None:
        try:
            behind, _ = await read(header)
        except ProxyHeaderError:
            return
        assert not behind.address or ip_address(behind.address)

    trio.run(run)


def test_where_headers_are_expected() -> None:
    headers = ProxyHeaders(["10.0.0.0/8", "fd00::/8"])
    assert headers.expects("10.1.2.3") and headers.expects("fd00::1")
    assert not headers.expects("192.0.2.1") and not headers.expects("fe80::1%eth0")
    assert not ProxyHeaders([]).expects("10.1.2.3")
