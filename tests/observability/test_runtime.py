"""The process's own numbers: the lag is what a task waited, the pauses are the collector's."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import trio
from fakehost import FakeHost
from trio.testing import MockClock

from observability import metrics
from observability.runtime import LAG_PERIOD, LAG_WINDOW, LagMeter, PauseMeter, RuntimeMetrics


def read(runtime: RuntimeMetrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in runtime.collect()
        for sample in metric.samples
    }


@pytest.fixture
def pauses() -> Iterator[PauseMeter]:
    meter = PauseMeter()
    meter.install()
    yield meter
    meter.remove()


async def test_lag_is_measured_and_forgotten(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    meter = LagMeter()
    assert (meter.newest(), meter.worst()) == (0, 0)
    nursery.start_soon(meter.run)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(LAG_PERIOD + 2)  # the loop did not turn for two seconds more than it should
    assert meter.newest() == 2  # overdue already, before the task had its turn
    await trio.testing.wait_all_tasks_blocked()
    assert (meter.newest(), meter.worst()) == (2, 2)
    mock_clock.jump(LAG_PERIOD)
    await trio.testing.wait_all_tasks_blocked()
    assert (meter.newest(), meter.worst()) == (0, 2)
    mock_clock.jump(LAG_WINDOW)
    assert meter.worst() == 0
    nursery.cancel_scope.cancel()


async def test_pauses_of_the_collector(pauses: PauseMeter) -> None:
    runtime = RuntimeMetrics(LagMeter(), pauses)
    before = read(runtime)
    for generation in range(3):
        assert ("python_gc_pause_seconds_count", str(generation)) in before
    gc.collect(2)
    after = read(runtime)
    key = ("python_gc_pause_seconds_count", "2")
    assert after[key] >= before[key] + 1
    assert after["python_gc_pause_seconds_sum", "2"] > before["python_gc_pause_seconds_sum", "2"]


def test_a_meter_put_in_during_a_collection_counts_whole_pauses_only() -> None:
    meter = PauseMeter()
    meter._callback("stop", {"generation": 0})
    assert meter.pauses[0].count == 0


async def test_numbers_of_the_process(pauses: PauseMeter) -> None:
    numbers = read(RuntimeMetrics(LagMeter(), pauses))
    assert numbers["python_allocated_blocks",] > 1000
    assert numbers["trio_tasks_living",] >= 1
    assert numbers["trio_tasks_runnable",] >= 0
    assert numbers["trio_run_loop_lag_seconds",] == 0
    assert numbers["process_resident_memory_bytes",] > 1 << 20
    assert numbers["process_virtual_memory_bytes",] >= numbers["process_resident_memory_bytes",]
    assert not [key for key in numbers if key[0].startswith("go_")]


async def test_go_names_come_from_the_same_sources(pauses: PauseMeter) -> None:
    gc.collect(2)
    numbers = read(RuntimeMetrics(LagMeter(), pauses, go_names=True))
    assert numbers["go_goroutines",] == numbers["trio_tasks_living",]
    assert numbers["go_memstats_alloc_bytes",] == numbers["process_resident_memory_bytes",]
    assert numbers["go_memstats_heap_inuse_bytes",] == numbers["process_resident_memory_bytes",]
    assert numbers["go_gc_duration_seconds_count",] >= 1
    assert numbers["go_gc_duration_seconds_sum",] > 0
    quantiles = [numbers["go_gc_duration_seconds", which] for which in ("0", "0.25", "0.5", "0.75", "1")]
    assert quantiles == sorted(quantiles)


async def test_the_plugin_leaves_nothing_behind() -> None:
    callbacks = list(gc.callbacks)
    # the nursery ends only if the plug-in's task does
    async with trio.open_nursery() as nursery, metrics.plugin(FakeHost(nursery=nursery)):
        assert len(gc.callbacks) == len(callbacks) + 1
    assert gc.callbacks == callbacks


async def test_the_plugin_cleans_up_after_a_failure() -> None:
    callbacks = list(gc.callbacks)
    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="broken"):
            async with metrics.plugin(FakeHost("agent", nursery=nursery)):
                raise ValueError("broken")
    assert gc.callbacks == callbacks
