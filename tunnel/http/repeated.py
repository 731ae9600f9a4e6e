"""Heads that say what the last one on their connection said, with another address.

Most requests on a kept connection are such: a browser's pictures, an API client's calls. What was judged once, byte for
byte, need not be judged again: such a head is recognised by comparing what stands before and behind its address, and
only the address is looked at. That saves h11 and the checks around it, a quarter of the core's work for a request.

The slow way beside it is `heads.parse_request`, which sees the first head of each connection and every other that
differs. tests/http/test_repeated.py shows that both say the same of the same bytes.
"""

from __future__ import annotations

import re

from tunnel.http.heads import Head

MAX_KEPT = 4096  #: bytes of a head without its address: a visitor's connection keeps one, also while it is idle
MAX_FIELDS = 32
_PATH = re.compile(rb"/[!-\"$-~]*")  # what `heads` takes for an address in origin form


class KnownHead:
    """A head that was parsed. `before` and `behind` are its bytes around the address, the spaces included."""

    __slots__ = ("_after", "_before", "_behind", "_size", "head")

    def __init__(self, before: bytes, behind: bytes, head: Head) -> None:
        self.head = head
        self._before = before
        self._behind = behind
        self._after = len(before)
        self._size = len(before) + len(behind)

    def recognise(self, raw: bytes, max_target: int) -> bytes:
        """The address in a head that is this one but for its address; b"" for any other, or an address that is odd."""
        size = len(raw) - self._size
        if 0 < size <= max_target and raw.startswith(self._before) and raw.endswith(self._behind):
            target = raw[self._after : self._after + size]
            if _PATH.fullmatch(target) is not None:
                return target
        return b""


def know(raw: bytes, head: Head) -> KnownHead | None:
    """What can be recognised again of a head that `parse_request` has made of `raw`, None if that had better not be.

    Not: an address in another form than the plain one, an upgrade (it ends the connection anyway), what is large.
    """
    before = head.method + b" "
    around = before + head.target + b" HTTP/1.1\r\n"
    if (
        not raw.startswith(around)
        or not head.target.startswith(b"/")
        or head.upgrade
        or len(raw) - len(head.target) > MAX_KEPT
        or len(head.fields) > MAX_FIELDS
    ):
        return None
    return KnownHead(before, raw[len(before) + len(head.target) :], head)
