"""A plug-in with a bug that no guard catches: for host names beginning with "internal." the registry itself raises.

Layers are guarded and can't make a request fail, so this one replaces a method of the product from inside its process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tunnel.core.registry import Registry, Tunnel
from tunnel.handler import Handler, Host, Layer


@asynccontextmanager
async def plugin(_: Host) -> AsyncIterator[Layer]:
    sound = Registry.find

    def find(self: Registry, host: str) -> Tunnel | None:
        if host.startswith("internal."):
            raise ZeroDivisionError("a fault for the test")
        return sound(self, host)

    def layer(handler: Handler) -> Handler:
        return handler

    Registry.find = find  # type: ignore[method-assign]
    try:
        yield layer
    finally:
        Registry.find = sound  # type: ignore[method-assign]
