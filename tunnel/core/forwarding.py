"""The fields that tell a local service who asked: X-Forwarded-For, -Proto, -Host, Forwarded (RFC 7239), X-Request-Id.

They are set by us. What a visitor sends under these names, and under those of `PROXIED`, which we don't set, is
believed only when it comes from a trusted proxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunnel.core.crowds import crowd_of
from tunnel.core.limits import Shares
from tunnel.core.visitor import Visitor
from tunnel.errors import Failure
from tunnel.http.heads import PROXIED, forwarded_head

if TYPE_CHECKING:
    from tunnel.core.request import Request
    from tunnel.http.heads import Head

MAX_LIST = 4096  #: bytes of a trusted proxy's list that are passed on


class Forwarding:
    """trusted: networks (CIDR) of proxies in front of the core. max_guest: requests at a time of one address behind
    them, whose connections the proxy hides from us; 0: any number."""

    def __init__(self, trusted: Sequence[str], max_guest: int = 0, guests: Shares | None = None) -> None:
        self._guests = guests or Shares(0, max_guest)
        self._trusted = [ipaddress.ip_network(one, strict=False) for one in trusted]

    def head(self, request: Request, *, upgrade: bool) -> bytes:
        """The request's head as it travels to the agent, our own fields last. As `fields`."""
        head, known = request.head, request.known
        assert head is not None
        request_id = request.request_id.encode()
        if known is not None and known.forwarded:
            return b"%b %b%b%b\r\n" % (head.method, head.target, known.forwarded, request_id)
        forwarded = forwarded_head(head, self.fields(request), upgrade=upgrade)
        if known is not None and not request.told:  # what a proxy says is the request's own
            known.forwarded = forwarded[len(head.method) + 1 + len(head.target) : -len(request_id) - 2]
        return forwarded

    def identify(self, request: Request) -> None:
        """Read what a trusted proxy says about who asks, before a link is chosen for that: `request.client`, and its
        fields. Raises Failure."""
        assert request.head is not None
        request.told = self._after_proxy(request, request.visitor, request.head)

    def fields(self, request: Request) -> bytes:
        """The fields for this request, each line ended by CRLF; what a trusted proxy says is known by `identify`."""
        visitor, head = request.visitor, request.head
        assert head is not None
        if request.told:
            own = request.told
        elif visitor.forwarded[0] == head.host and visitor.forwarded[1]:
            own = visitor.forwarded[1]
        else:
            own = _fields(visitor.address, [visitor.address], visitor.proto, head.host, [])
            visitor.forwarded = (head.host, own)
        return own + b"X-Request-Id: " + request.request_id.encode() + b"\r\n"

    def _enter(self, visitor: Visitor, client: str) -> None:
        """Count the request as one of its address; once, also if it is tried on another link. Raises Failure."""
        self.leave(visitor)
        is_proxy = self.is_trusted(client)
        visitor.crowd = "" if is_proxy else crowd_of(client)
        if self._guests.enter(client, is_proxy):
            text = "too many requests of this address are under way"
            raise Failure("overloaded", text, retry_after=1, limit="connections_per_address")
        visitor.guest = client

    def leave(self, visitor: Visitor) -> None:
        """The request that this proxy's connection brought is over."""
        if visitor.guest is not None:
            self._guests.leave(visitor.guest)
            visitor.guest = None

    def is_trusted(self, address: str) -> bool:
        """Whether this is the address of one of the proxies."""
        if not self._trusted:
            return False
        try:
            ip = ipaddress.ip_address(_address(address))
        except ValueError:
            return False
        return any(ip in network for network in self._trusted)

    def _after_proxy(self, request: Request, visitor: Visitor, head: Head) -> bytes:
        """Append to what the proxy said; the visitor is the last address in the list that is no trusted proxy."""
        seen = {b"x-forwarded-for": b"", b"x-forwarded-proto": b"", b"x-forwarded-host": b"", b"forwarded": b""}
        also = b""
        for name, raw_name, value in head.fields:
            if name in seen:
                seen[name] = seen[name] + b", " + value if seen[name] else value
            elif name in PROXIED and name not in head.connection:
                also += raw_name + b": " + value + b"\r\n"
        chain = [one.strip().decode("latin-1") for one in _last(seen[b"x-forwarded-for"]).split(b",")]
        chain = [one for one in chain if one] + [visitor.address]
        client = next((one for one in reversed(chain) if not self.is_trusted(one)), chain[0])
        request.client = _address(client) or visitor.address
        self._enter(visitor, request.client)
        proto = seen[b"x-forwarded-proto"].decode("latin-1").split(",")[-1].strip()
        if proto in ("http", "https"):
            request.scheme = proto
        host = seen[b"x-forwarded-host"].split(b",")[0].strip() or head.host
        before = [one for one in [_last(seen[b"forwarded"])] if one]
        return _fields(visitor.address, chain, request.scheme, host, before) + also


def _last(value: bytes) -> bytes:
    """The end of a list that is longer than we pass on, from its first whole element."""
    return value if len(value) <= MAX_LIST else value[-MAX_LIST:].partition(b",")[2].strip()


def _address(node: str) -> str:
    """An element of X-Forwarded-For without the port and brackets that some proxies add, IPv4-mapped ones as IPv4."""
    if node.startswith("["):
        node = node[1:].partition("]")[0]
    elif node.count(":") == 1:
        node = node.partition(":")[0]
    return node.lower().removeprefix("::ffff:") if "." in node else node


def _fields(client: str, chain: list[str], proto: str, host: bytes, before: list[bytes]) -> bytes:
    node = f'"[{client}]"' if ":" in client else client
    element = b'for=%b;host="%b";proto=%b' % (node.encode(), host.replace(b'"', b""), proto.encode())
    return b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\nForwarded: %b\r\n" % (
        ", ".join(chain).encode("latin-1", "replace"),
        proto.encode(),
        host,
        b", ".join([*before, element]),
    )
