"""The store as a core has it: opened when it can be reached, and left in time with what is written last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tunnel.config import CoreSettings
from tunnel.core.private import make_private
from tunnel.core.store import Store, StoreError
from tunnel.errors import ConfigError
from tunnel.handler import Layer
from tunnel.log import get_logger

log = get_logger("tunnel.core")

STORE_PAUSE = 2.0  #: seconds between tries to open the store
LAST_WRITES = 3.0  #: seconds that the store has at most for what is written last, within the drain's time
LEAST_WRITES = 1.0  #: and at least, also beyond it, or after a second signal
CLOSE_TIME = 1.0  #: seconds for its connections to be closed


@asynccontextmanager
async def opened(
    settings: CoreSettings,
    directory: Path,
    layers: Sequence[Layer],
    draining: trio.Event,
    write_last: Callable[[], Awaitable[None]],
) -> AsyncIterator[Store | None]:
    """None when a drain began while it was away. Raises ConfigError, StoreError."""
    try:
        make_private(directory)
    except OSError as exc:
        raise ConfigError(f"-data-dir: can't make {directory} ({exc.strerror}); give another one") from exc
    store = Store(settings.database.url, directory, layers)
    if not await reach(store, settings.database.wait, draining):
        yield None
        return
    try:
        yield store
    finally:
        store.end_by(trio.current_time() + LAST_WRITES)
        with trio.CancelScope(shield=True):
            await write_last()
            with trio.move_on_after(CLOSE_TIME):
                await store.close()


async def reach(store: Store, seconds: float, draining: trio.Event) -> bool:
    """Open it. One that is away gets a while: a database may start later than we do. False: a drain began."""
    until = trio.current_time() + seconds
    while not draining.is_set():
        try:
            await store.open()
            return True
        except StoreError as exc:
            left = until - trio.current_time()
            if left <= 0:
                raise
            log.warning("the store is away, trying again", cause=str(exc), left=f"{left:.0f}s")
            with trio.move_on_after(min(left, STORE_PAUSE)):
                await draining.wait()
    return False


async def hurry(store: Store) -> None:
    """When all is cancelled, as by a second signal, what the store still writes has a moment."""
    try:
        await trio.sleep_forever()
    finally:
        store.end_by(trio.current_time() + LEAST_WRITES)
