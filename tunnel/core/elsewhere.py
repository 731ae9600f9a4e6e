"""Where a request may go whose tunnel has no link in this process: to another one that has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tunnel.core.request import Request


class Elsewhere(Protocol):
    """Asked once the head of a request is read and before any layer hears of it."""

    def serves(self, request: Request) -> bool:
        """Whether it should be offered the request: nobody here serves its tunnel, another process does."""

    async def take(self, request: Request) -> bool:
        """Take over the visitor's connection with this request; its socket is closed here then. False: it stays."""
