"""Where observations go: every histogram's bounds in this one place, and the histogram that counts them.

The bounds fit what is measured: a tunnel adds 0.3 ms to 2 s, an answer may take as long as the time-outs (30 s) allow,
bodies are 0 B to 1 GiB. Alerts compare with 2 s, so 2 s is a bound and the comparison needs no interpolation.

The histogram is our own because it sits on the hot path: plain integers, no lock, no label look-up. Everything that
observes runs on the one thread of the run loop, and so does the scrape.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

REQUEST_SECONDS = (0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
REQUEST_MICROSECONDS = tuple(float(round(seconds * 1e6)) for seconds in REQUEST_SECONDS)
#: a stream may be a small exchange, a download, or a WebSocket that stays open all day
STREAM_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
ROUND_TRIP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
QUERY_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
BODY_BYTES = (0.0, *(float(1 << exponent) for exponent in (8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)))
GC_PAUSE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Histogram:
    """Counts observations by bucket; a bound belongs to its bucket (`le`).

    counts: one integer a bucket, not cumulative, the last for +Inf. exemplars: per bucket the newest traced
    observation as (trace_id, value, unix seconds), or None.
    """

    __slots__ = ("_find_bucket", "bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._find_bucket = partial(bisect_left, bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: list[tuple[str, float, float] | None] = [None] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, trace_id: str = "") -> None:
        """Count one value; `trace_id` is that of an exported trace, "" where there is none."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if trace_id:
            self.exemplars[bucket] = (trace_id, value, time.time())

    def observe_all(self, values: Sequence[float], trace_ids: Sequence[str] = ()) -> None:
        """The same for many in a row. trace_ids: one for each value, or none at all."""
        counts = self.counts
        for bucket in map(self._find_bucket, values):
            counts[bucket] += 1
        self.sum += sum(values)
        if any(trace_ids):
            now = time.time()
            for value, trace_id in zip(values, trace_ids, strict=True):
                if trace_id:
                    self.exemplars[self._find_bucket(value)] = (trace_id, value, now)

    @property
    def count(self) -> int:
        return sum(self.counts)
