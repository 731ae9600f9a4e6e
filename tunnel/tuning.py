"""The garbage collector and malloc, set for a server.

What was imported is never looked at again by the collector, and its passes are rarer. So rare that what lives long and
leaves cycles behind is hardly ever found: each link does (the WebSocket library's objects refer to each other), with
some 20 KiB. `Litter` counts such ends and collects when they are many.
"""

from __future__ import annotations

import ctypes
import gc

THRESHOLDS = (20_000, 20, 50)

# Of glibc's malloc (mallopt(3)): parameters, and what is set.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MAPPED = 2 * 1024 * 1024  #: bytes from which a block gets pages of its own, which the kernel has to clear each time
KEPT = 4 * 1024 * 1024  #: free bytes at the heap's end that are not given back


def tune() -> None:
    """Call once, after all imports and before serving."""
    _tune_malloc()
    _tune_gc()


def _tune_malloc() -> None:
    """Keep the pages of buffers. Out of the box each read of bulk (256 KiB) and each message (from 128 KiB) is mapped,
    filled and unmapped again: a fifth of bulk speed. Other C libraries have no mallopt, and nothing happens there."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED)
    mallopt(_M_TRIM_THRESHOLD, KEPT)


def _tune_gc() -> None:
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
