"""What the visitors of one address may have of a link, so that they cannot take all of its places.

A request holds its place for as long as its visitor likes: a body that comes in crumbs, an answer that is hardly read,
a WebSocket. A least rate for bodies would end the first of these only, and honest ones with it (what is uploaded as it
comes about is slow by nature). So places are shared instead, as the buffers of a switch are (A. K. Choudhury and E. L.
Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998): an address may have `share` percent
of those that the others leave. One that is alone may have that much, of two each has a smaller part, and some always
stay free for a newcomer.
"""

from __future__ import annotations

from tunnel.core.limits import network_of
from tunnel.net import is_loopback

SHARE = 50  #: percent
FEW = 8  #: places that an address may have in any case as long as there are any: a browser opens six connections


def crowd_of(address: str) -> str:
    """What the address counts as; "" for this machine's own, from which anything may come."""
    return "" if is_loopback(address) else network_of(address)


class Crowds:
    """held: open requests on one link, by what the visitors' addresses count as. share: percent; 100: all."""

    __slots__ = ("_per_free", "held")

    def __init__(self, share: int = SHARE) -> None:
        self.held: dict[str, int] = {}
        self._per_free = share / (100 - share) if share < 100 else float("inf")

    def may_enter(self, crowd: str, free: int) -> bool:
        """Whether one more may have one of the free places, of which there is one at least."""
        held = self.held.get(crowd, 0)
        return held < FEW or held < free * self._per_free

    def enter(self, crowd: str) -> None:
        self.held[crowd] = self.held.get(crowd, 0) + 1

    def leave(self, crowd: str) -> None:
        left = self.held[crowd] - 1
        if left:
            self.held[crowd] = left
        else:
            del self.held[crowd]
