"""The process itself: memory, tasks, the run loop's lag, the garbage collector's pauses.

trio_run_loop_lag_seconds is measured by a task that asks to be woken at a time and looks how late it was: what any
other task had to wait at that moment. The gauge is the worst of the last 15 seconds, so a scrape misses no stall.
Collector pauses come from gc.callbacks; they are as long as they are counted, since nothing else runs meanwhile.

`metrics.go_names` also exports the four Go names of the reference page from the same sources. Python keeps no count
of bytes in use, so both go_memstats_* are the resident memory: no less than what is in use, and what an alert wants.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Iterator

import trio
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric

from observability.buckets import GC_PAUSE_SECONDS, Histogram
from observability.exposition import Family, families
from tunnel.handler import Host

LAG_PERIOD = 0.5  # seconds between two measurements
LAG_WINDOW = 15.0  # seconds that the gauge looks back: a usual scrape interval

FAMILIES = families(
    Family("python_allocated_blocks", "gauge", "Memory blocks that Python has allocated."),
    Family("trio_tasks_living", "gauge", "Tasks that have not ended."),
    Family("trio_tasks_runnable", "gauge", "Tasks that are waiting for their turn."),
    Family(
        "trio_run_loop_lag_seconds",
        "gauge",
        "How late the run loop woke a task, worst of the last 15 seconds.",
        merge="max",
    ),
    Family("python_gc_pause_seconds", "histogram", "Pauses of the garbage collector.", ("generation",)),
)
GO_FAMILIES = families(
    Family("go_memstats_alloc_bytes", "gauge", "Resident memory (name kept for Go dashboards)."),
    Family("go_memstats_heap_inuse_bytes", "gauge", "Resident memory (name kept for Go dashboards)."),
    Family("go_goroutines", "gauge", "Trio tasks living (name kept for Go dashboards)."),
)
_GO_PAUSES = "go_gc_duration_seconds"


def spans_sent(host: Host) -> tuple[int, int]:
    """(exported, dropped) spans since the start, as the tracing plug-in counts them; zeros where it exports none."""
    counts = host.details().get("tracing", {})
    return counts.get("exported", 0), counts.get("dropped", 0) + counts.get("failed", 0)


class LagMeter:
    """Measures how late the run loop is. `run()` is a task that goes on until it is cancelled."""

    def __init__(self) -> None:
        self._due = float("inf")
        self._seen: deque[tuple[float, float]] = deque(maxlen=int(LAG_WINDOW / LAG_PERIOD))

    async def run(self) -> None:
        while True:
            self._due = trio.current_time() + LAG_PERIOD
            await trio.sleep_until(self._due)
            now = trio.current_time()
            self._seen.append((now, now - self._due))

    def newest(self) -> float:
        """Seconds: the last measurement, or how long one is overdue already."""
        overdue = trio.current_time() - self._due
        return max(overdue, self._seen[-1][1] if self._seen else 0.0)

    def worst(self) -> float:
        """Seconds: the worst in the window."""
        since = trio.current_time() - LAG_WINDOW
        return max((lag for at, lag in self._seen if at >= since), default=0.0)


class PauseMeter:
    """Measures the garbage collector while it is installed. A collection runs to its end in one thread at a time."""

    def __init__(self) -> None:
        self.pauses = [Histogram(GC_PAUSE_SECONDS) for _ in range(3)]  # by generation
        self.newest: deque[float] = deque(maxlen=256)
        self._began = 0.0

    def install(self) -> None:
        gc.callbacks.append(self._callback)

    def remove(self) -> None:
        gc.callbacks.remove(self._callback)

    def _callback(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began:
            pause = time.perf_counter() - self._began
            self.pauses[info["generation"]].observe(pause)
            self.newest.append(pause)


class RuntimeMetrics:
    """The collector of it all. To be read inside the run loop that it describes."""

    def __init__(self, lag: LagMeter, pauses: PauseMeter, go_names: bool = False) -> None:
        self._lag = lag
        self._pauses = pauses
        self._go_names = go_names
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        process = list(self._process.collect())  # nothing where there is no /proc
        yield from process
        tasks = trio.lowlevel.current_statistics()
        one = FAMILIES
        yield one["python_allocated_blocks"].metric(((), sys.getallocatedblocks()))
        yield one["trio_tasks_living"].metric(((), tasks.tasks_living))
        yield one["trio_tasks_runnable"].metric(((), tasks.tasks_runnable))
        yield one["trio_run_loop_lag_seconds"].metric(((), self._lag.worst()))
        yield one["python_gc_pause_seconds"].metric(
            *(((str(generation),), histogram) for generation, histogram in enumerate(self._pauses.pauses))
        )
        if self._go_names:
            yield from self._go(process, tasks.tasks_living)

    def _go(self, process: list[Metric], tasks: int) -> Iterator[Metric]:
        one = GO_FAMILIES
        for metric in process:
            if metric.name == "process_resident_memory_bytes":
                resident = metric.samples[0].value
                yield one["go_memstats_alloc_bytes"].metric(((), resident))
                yield one["go_memstats_heap_inuse_bytes"].metric(((), resident))
        yield one["go_goroutines"].metric(((), tasks))
        summary = Metric(_GO_PAUSES, "Pauses of the garbage collector (name kept for Go dashboards).", "summary")
        newest = sorted(self._pauses.newest) or [0.0]
        for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
            summary.add_sample(
                _GO_PAUSES, {"quantile": f"{quantile:g}"}, newest[min(int(quantile * len(newest)), len(newest) - 1)]
            )
        summary.add_sample(f"{_GO_PAUSES}_sum", {}, sum(histogram.sum for histogram in self._pauses.pauses))
        summary.add_sample(f"{_GO_PAUSES}_count", {}, sum(histogram.count for histogram in self._pauses.pauses))
        yield summary
