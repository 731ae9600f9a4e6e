"""The garbage collector, set for a server: what was imported is never looked at again, and passes are rarer.

So rare that what lives long and leaves cycles behind is hardly ever found: each link does (the WebSocket library's
objects refer to each other), with some 20 KiB. `Litter` counts such ends and collects when they are many.
"""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 50)


def tune_gc() -> None:
    """Call once, after all imports and before serving."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


class Litter:
    """least: so many are always left lying.

    A whole pass looks at all that lives, so it waits for about as many ends as there are living: then its cost for each
    of them stays the same, and what lies around is never more than what lives.
    """

    def __init__(self, least: int = 200) -> None:
        self._least = least
        self._dropped = 0

    def drop(self, living: int) -> None:
        """One has ended; so many live."""
        self._dropped += 1
        if self._dropped >= max(self._least, living):
            self._dropped = 0
            gc.collect()
