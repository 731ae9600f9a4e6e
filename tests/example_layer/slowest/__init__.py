"""An example layer: keeps the slowest requests of a core and shows them at /slowest on the metrics address.

`tunnel.handler` is all it knows of the tunnel. SLOWEST_BREAKS=entry, middle or exit makes it raise there, to show that
a broken layer changes no answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tunnel.handler import Handler, Host, Layer, PageAnswer, PageRequest, RequestVisit, Visit, monotonic

KEPT = 10


@asynccontextmanager
async def plugin(host: Host) -> AsyncIterator[Layer]:
    """Yields the layer; what it has started would be cleaned up after the yield."""
    slowest: list[tuple[float, str, str]] = []
    breaks = os.environ.get("SLOWEST_BREAKS", "")

    def layer(handler: Handler) -> Handler:
        async def timed(visit: Visit) -> None:
            if not isinstance(visit, RequestVisit):
                await handler(visit)
                return
            if breaks == "entry":
                raise RuntimeError("broken on entry")
            try:
                await handler(visit)
                if breaks == "middle":
                    raise KeyError("broken in the middle")
            finally:
                slowest.append((monotonic() - visit.started, visit.method, visit.tunnel))
                slowest.sort(reverse=True)
                del slowest[KEPT:]
                if breaks == "exit":
                    raise ValueError("broken on exit")

        return timed

    async def page(_: PageRequest) -> PageAnswer:
        rows = [{"seconds": seconds, "method": method, "tunnel": tunnel} for seconds, method, tunnel in slowest]
        return PageAnswer(200, json.dumps(rows).encode(), "application/json")

    host.add_page("/slowest", page)
    yield layer
