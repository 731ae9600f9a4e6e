"""Where observations go: every histogram's bounds in this one place, and the histogram that counts them.

The bounds fit what is measured: a tunnel adds 0.3 ms to 2 s, an answer may take as long as the time-outs (30 s) allow,
bodies are 0 B to 1 GiB. Alerts compare with 2 s, so 2 s is a bound and the comparison needs no interpolation.

The histogram is our own because it sits on the hot path: plain integers, no lock, no label look-up. Everything that
observes runs on the one thread of the run loop, and so does the scrape.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

REQUEST_SECONDS = (0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
REQUEST_MICROSECONDS = tuple(float(round(seconds * 1e6)) for seconds in REQUEST_SECONDS)
#: a stream may be a small exchange, a download, or a WebSocket that stays open all day
STREAM_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
ROUND_TRIP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
QUERY_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
BODY_BYTES = (0.0, *(float(1 << exponent) for exponent in (8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)))
GC_PAUSE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)

MOST_GATHERED = 512  #: observations that wait to be counted


class Histogram:
    """Counts observations by bucket; a bound belongs to its bucket (`le`).

    counts: one integer a bucket, not cumulative, the last for +Inf. exemplars: per bucket the newest traced
    observation as (trace_id, value, unix seconds), or None.

    What comes many at a time is gathered and counted when somebody looks, or when there is much of it: to sort some
    hundred numbers and to find the bounds among them takes fewer steps than to find each one's bucket.
    """

    __slots__ = ("_counts", "_gathered", "_sum", "bounds", "exemplars")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.exemplars: list[tuple[str, float, float] | None] = [None] * (len(bounds) + 1)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._gathered: list[float] = []

    def observe(self, value: float, trace_id: str = "") -> None:
        """Count one value; `trace_id` is that of an exported trace, "" where there is none."""
        bucket = bisect_left(self.bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if trace_id:
            self.exemplars[bucket] = (trace_id, value, time.time())

    def observe_all(self, values: Sequence[float], trace_ids: Sequence[str] = ()) -> None:
        """The same for many in a row. trace_ids: one for each value, or none at all."""
        self._gathered += values
        if len(self._gathered) >= MOST_GATHERED:
            self._count()
        if any(trace_ids):
            now = time.time()
            for value, trace_id in zip(values, trace_ids, strict=True):
                if trace_id:
                    self.exemplars[bisect_left(self.bounds, value)] = (trace_id, value, now)

    def _count(self) -> None:
        gathered, counts = self._gathered, self._counts
        self._sum += sum(gathered)
        gathered.sort()
        below, size = 0, len(gathered)
        for bucket, bound in enumerate(self.bounds):
            if below == size:
                break
            upto = bisect_right(gathered, bound, below)
            counts[bucket] += upto - below
            below = upto
        counts[-1] += size - below
        gathered.clear()

    @property
    def counts(self) -> list[int]:
        self._count()
        return self._counts

    @property
    def sum(self) -> float:
        self._count()
        return self._sum

    @property
    def count(self) -> int:
        return sum(self.counts)
