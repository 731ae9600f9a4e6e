"""The garbage collector, set for a server: what was imported is never looked at again, and passes are rarer."""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 50)


def tune_gc() -> None:
    """Call once, after all imports and before serving."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
