"""What we accept, h11 and llhttp read the same: method, address, fields, body, and where the next request begins.

Two strict readers that agree with us are no proof, but a reader behind the tunnel that differs from all three would be
odd. What one of them refuses that we take is listed with the reason; it is never read in another way.
"""

import re
from collections.abc import Callable

from framing.readers import Reading, h11_reads, llhttp_reads, ours

from tunnel.http.heads import CHUNKED as CHUNKED_BODY

#: llhttp knows these methods only; any other is an error to it and a token to RFC 9110
METHODS = re.compile(
    rb"GET|HEAD|PUT|POST|PATCH|DELETE|OPTIONS|PROPFIND|PROPPATCH|MKCOL|MKACTIVITY|MKCALENDAR|COPY|MOVE|LOCK|UNLOCK|SEARCH"
    rb"|M-SEARCH|BIND|REBIND|UNBIND|ACL|REPORT|CHECKOUT|MERGE|NOTIFY|SUBSCRIBE|UNSUBSCRIBE|PURGE|LINK|UNLINK|SOURCE|QUERY"
)


def llhttp_refuses(one: Reading, raw: bytes, why: str) -> str:
    """The reason for which llhttp may refuse what we take, "" when it should not."""
    assert one.head is not None
    chunked = one.head.length == CHUNKED_BODY
    if why == "upgrade":
        return "it stops at an upgrade that we don't pass on"
    if METHODS.fullmatch(one.method) is None:
        return "a method that it does not know"
    if chunked and re.search(rb"(?im)^[0-9a-f]+;[^\r\n]*\r$", raw):
        return "chunk extensions: it takes tokens and quoted strings only; we drop what they say"
    if chunked and re.search(rb"(?i)\ntransfer-encoding:[^\r]*[\t ]\r", raw):
        return "space behind a Transfer-Encoding: RFC 9112 allows it around any value"
    if one.target.lower().startswith(b"http"):
        return "its own rules for the characters of a URL's authority"
    return ""


def llhttp_differs(one: Reading) -> str:
    """The reason for which it may read otherwise what we take."""
    assert one.head is not None
    if one.head.upgrade and b"upgrade" in one.head.connection and one.head.length:
        return "it takes a body behind a request for an upgrade for the new protocol's: our connection ends there"
    return ""


def h11_refuses(one: Reading, raw: bytes, why: str) -> str:
    return "it knows no empty line before a request" if why == "no request line received" else ""


READERS: dict[str, tuple[Callable[[bytes], tuple[list[Reading], str]], Callable[[Reading, bytes, str], str]]] = {
    "h11": (h11_reads, h11_refuses),
    "llhttp": (llhttp_reads, llhttp_refuses),
}


def compare(raw: bytes) -> int:
    """Raises AssertionError when somebody reads `raw` otherwise than we do; returns how many requests we took."""
    accepted, _ = ours(raw)
    for name, (read, may_refuse) in READERS.items():
        theirs, why = read(raw)
        for number, one in enumerate(accepted):
            if not one.whole:
                break  # refused or not complete: nothing of it is whole at the local service either
            if number >= len(theirs) or not theirs[number].whole:
                assert may_refuse(one, raw, why), f"{name} refuses ({why}) what we take: {raw!r}"
                break
            if name == "llhttp" and llhttp_differs(one):
                break
            assert theirs[number].facts() == one.facts(), f"{name} reads otherwise: {raw!r}"
    for one in accepted:
        if one.whole:
            _compare_canonical(one)
    return len(accepted)


def _compare_canonical(one: Reading) -> None:
    """What leaves for the local service is one request to everybody, and the one that came."""
    assert one.head is not None
    raw = one.canonical()
    method, target, body = one.method, one.head.target, one.body
    again, _ = ours(raw)
    for name, (read, may_refuse) in {"we": (ours, h11_refuses), **READERS}.items():
        theirs, why = read(raw)
        if not theirs and may_refuse(one, raw, why):
            continue
        assert len(theirs) == 1, f"{name} ({why}): {raw!r}"
        assert (theirs[0].method, theirs[0].target, theirs[0].body, theirs[0].whole) == (method, target, body, True)
        assert theirs[0].fields == again[0].fields
