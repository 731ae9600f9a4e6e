"""Redirects of a service that gets another Host than the visitor typed: they lead where only itself would find it.

A service that is told that it is `localhost:3000` says `Location: http://localhost:3000/login`, which is the visitor's
own machine. So what leads to the service itself leads to the public origin instead, as the core tells it in
X-Forwarded-Host and X-Forwarded-Proto:

1. the authority is the Host that the service was given, its address, or on loopback another name of that port;
2. the scheme becomes the visitor's where it is the service's own. Another one is meant: a service without TLS that
   sends to https wants that, and the visitor's plain http would bring it back to the same answer for ever;
3. other authorities and relative references stay as they are, and so do links in pages, Content-Location, and a
   cookie's Domain, as with other proxies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

_LOCATION = re.compile(rb"(?i)(?<=\nlocation: )(?:(https?):)?//([^/?#\\@\s]+)(?=[/?#\\\r])")
_ASKED = re.compile(rb"(?im)^x-forwarded-(proto|host): ([^\r\n]*)\r$")
_AUTHORITY = re.compile(rb"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_USUAL = {b"http": b":80", b"https": b":443"}

MOST_FIELDS = 4  #: that are rewritten of one answer, and get longer: browsers take a few, if they say the same
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")


class Redirects:
    """scheme: the service's. authorities: by which it may call itself, host:port or host alone where that is usual."""

    def __init__(self, scheme: str, authorities: Iterable[str]) -> None:
        self._scheme = scheme.encode()
        self._own = frozenset(_plain(one.lower().encode(), self._scheme) for one in authorities)
        self._hosts = frozenset(_host(one) for one in self._own)

    def rewrite(self, head: bytes, asked: bytes) -> bytes:
        """head: of an answer, as the link carries it. asked: the fields of its request, as they came over the link."""
        return _LOCATION.sub(partial(self._lead, asked), head, MOST_FIELDS)

    def _lead(self, asked: bytes, found: re.Match[bytes]) -> bytes:
        scheme = (found[1] or self._scheme).lower()
        is_own_scheme = scheme == self._scheme
        authority = _plain(found[2].lower(), scheme)
        if authority not in self._own and (is_own_scheme or authority not in self._hosts):
            return found[0]
        origin: dict[bytes, bytes] = {match[1].lower(): match[2] for match in _ASKED.finditer(asked)}
        proto, host = origin.get(b"proto", b""), origin.get(b"host", b"")
        match = _AUTHORITY.fullmatch(host)
        if proto not in _USUAL or match is None:  # not as a core says it
            return found[0]
        if not found[1]:
            public = b"//" + host
        elif is_own_scheme or scheme == proto:
            public = proto + b"://" + host
        else:
            public = scheme + b"://" + _host(host)  # the port is the other scheme's
        return public


def _plain(authority: bytes, scheme: bytes) -> bytes:
    """Without the port that goes without saying."""
    return authority.removesuffix(_USUAL[scheme])


def _host(authority: bytes) -> bytes:
    return re.sub(rb":[0-9]*$", b"", authority)
