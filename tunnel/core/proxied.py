"""PROXY protocol: who is behind a load balancer that passes bytes on without reading them.

Where it is trusted, each connection begins with a header, version 1 (a line) or 2 (binary), and one without is refused:
nobody is to guess. From anywhere else these bytes are a visitor's own, and a bad request. Not a byte more than the
header is read, so that TLS can follow. Source: haproxy.org/download/3.0/doc/proxy-protocol.txt, sections 2.1 and 2.2.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from struct import unpack

import trio

from tunnel.errors import TunnelError
from tunnel.net import Socket

MAX_V1 = 107  # bytes of a line, CRLF included
MAX_V2 = 4096  # bytes after the fixed part; addresses take up to 216, the rest is for extensions
_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_FIXED = len(_SIGNATURE)  # no header is shorter: "PROXY UNKNOWN\r\n" has 15
_TLV_SSL = 0x20
_CLIENT_SSL = 0x01


class ProxyHeaderError(TunnelError):
    """A connection from a trusted proxy has no header or a bad one. The text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Behind:
    """address: the visitor's IP, "" where the proxy speaks for itself or does not know. secure: it came over TLS."""

    address: str = ""
    secure: bool = False


class ProxyHeaders:
    """trusted: networks (CIDR) of the proxies that send a header."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusted = [ipaddress.ip_network(one, strict=False) for one in trusted]

    def expects(self, address: str) -> bool:
        """Whether a connection from this IP begins with a header."""
        if not self._trusted:
            return False
        ip = ipaddress.ip_address(address.partition("%")[0])
        return any(ip in network for network in self._trusted)


async def read_header(stream: Socket) -> Behind:
    """The header that a plain connection begins with. Raises ProxyHeaderError, trio.BrokenResourceError."""
    start = await _exactly(stream, _FIXED)
    if start == _SIGNATURE:
        fixed = await _exactly(stream, 4)
        size = int.from_bytes(fixed[2:], "big")
        if size > MAX_V2:
            raise ProxyHeaderError(f"its header has {size} bytes, {MAX_V2} are taken at most")
        return parse_v2(fixed[0], fixed[1], await _exactly(stream, size))
    if not start.startswith(b"PROXY "):
        raise ProxyHeaderError("it does not begin with a PROXY protocol header")
    return parse_v1(await _line(stream, start))


def parse_v1(line: bytes) -> Behind:
    """`PROXY TCP4 192.0.2.1 198.51.100.1 56324 443`, its CRLF left out. Raises ProxyHeaderError."""
    words = line.decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return Behind()
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise ProxyHeaderError("its PROXY line is malformed")
    make = ipaddress.IPv4Address if words[1] == "TCP4" else ipaddress.IPv6Address
    try:
        source, target = make(words[2]), make(words[3])
    except ValueError:
        raise ProxyHeaderError("its PROXY line has no valid address") from None
    if getattr(source, "scope_id", None) or getattr(target, "scope_id", None):  # "::1%anything at all"
        raise ProxyHeaderError("its PROXY line has an address with a zone")
    if not all(one.isascii() and one.isdigit() and int(one) < 65536 for one in words[4:]):
        raise ProxyHeaderError("its PROXY line has no valid port")
    return Behind(_text(source))


def parse_v2(version: int, family: int, rest: bytes) -> Behind:
    """version: the byte with version and command; family: the one with address family and transport.

    Raises ProxyHeaderError.
    """
    if version >> 4 != 2 or version & 15 > 1:
        raise ProxyHeaderError(f"its header is of no known version or command (0x{version:02x})")
    if version & 15 == 0:  # LOCAL: the proxy's own, e.g. to see whether we are well
        return Behind()
    size, address = {1: (12, 4), 2: (36, 16), 3: (216, 0)}.get(family >> 4, (0, 0))
    if len(rest) < size:
        raise ProxyHeaderError("its header is shorter than its addresses")
    text = ""
    if address:
        text = _text(ipaddress.ip_address(rest[:address]))
    return Behind(text, _is_secure(rest[size:]))


def _is_secure(extensions: bytes) -> bool:
    """Whether one of the extensions says that the visitor's connection is TLS. Malformed ones end the list."""
    while len(extensions) >= 3:
        kind, size = unpack(">BH", extensions[:3])
        value = extensions[3 : 3 + size]
        if kind == _TLV_SSL and len(value) == size and size >= 5:
            return bool(value[0] & _CLIENT_SSL)
        extensions = extensions[3 + size :]
    return False


def _text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


async def _exactly(stream: Socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.recv(size - len(data))
        if not part:
            raise ProxyHeaderError("it ended within its PROXY protocol header")
        data += part
    return data


async def _line(stream: Socket, line: bytes) -> bytes:
    """The rest of a line that begins so: looked at first, so that nothing behind it is taken."""
    while not line.endswith(b"\r\n"):
        if len(line) >= MAX_V1:
            raise ProxyHeaderError(f"its PROXY line is longer than {MAX_V1} bytes")
        try:
            seen = stream.sock.recv(MAX_V1 - len(line), socket.MSG_PEEK)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(stream.sock)
            continue
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc
        end = seen.find(b"\n") + 1
        line += await _exactly(stream, end or max(len(seen), 1))
    return line[:-2]
