"""Layers around handlers: wrap, and the guard that makes a layer which breaks harmless."""

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tunnel.handler import Guard, Handler, Layer, RequestVisit, Visit, wrap

log = logging.getLogger("tests.handler")


class HandlerError(Exception):
    """What a handler raises itself."""


class LayerError(Exception):
    """What a layer raises."""


class Counting:
    """A handler that counts its runs, and may raise."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.runs = 0
        self.error = error

    async def __call__(self, visit: Visit) -> None:
        self.runs += 1
        visit.outcome = "ok"
        if self.error is not None:
            raise self.error


def layer(around: Callable[[Handler, Visit], Awaitable[None]]) -> Layer:
    def make(handler: Handler) -> Handler:
        async def layered(visit: Visit) -> None:
            await around(handler, visit)

        return layered

    return make


async def raises_on_entry(handler: Handler, visit: Visit) -> None:
    raise LayerError("on entry")


async def raises_on_exit(handler: Handler, visit: Visit) -> None:
    await handler(visit)
    raise LayerError("on exit")


async def raises_over_an_error(handler: Handler, visit: Visit) -> None:
    try:
        await handler(visit)
    finally:
        raise LayerError("over it")


async def raises_a_cause(handler: Handler, visit: Visit) -> None:
    try:
        await handler(visit)
    except HandlerError as exc:
        raise LayerError("translated") from exc


async def raises_in_the_middle(handler: Handler, visit: Visit) -> None:
    async def break_down() -> None:
        await trio.lowlevel.checkpoint()
        raise LayerError("in the middle")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_down)
        await handler(visit)


async def swallows_errors(handler: Handler, visit: Visit) -> None:
    try:
        await handler(visit)
    except HandlerError:
        pass


async def skips(handler: Handler, visit: Visit) -> None:
    pass


async def runs_twice(handler: Handler, visit: Visit) -> None:
    await handler(visit)
    await handler(visit)


async def passes(handler: Handler, visit: Visit) -> None:
    await handler(visit)


def reports(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    return [record.fields for record in caplog.records]  # type: ignore[attr-defined]


BAD = [raises_on_entry, raises_on_exit, raises_over_an_error, skips, runs_twice]
LATER = (raises_on_exit, runs_twice)  # do nothing wrong when the handler raises: they never come to it
bad = pytest.mark.parametrize("around", BAD, ids=lambda around: around.__name__)


# wrap ----------------------------------------------------------------------------------------------------------------


def test_no_layer_costs_nothing() -> None:
    handler = Counting()
    assert wrap(handler, []) is handler


async def test_the_first_layer_is_outermost() -> None:
    seen: list[str] = []

    def named(name: str) -> Layer:
        async def around(handler: Handler, visit: Visit) -> None:
            seen.append(f"{name} in")
            await handler(visit)
            seen.append(f"{name} out")

        return layer(around)

    handler = Counting()
    await wrap(handler, [named("a"), named("b")])(RequestVisit("192.0.2.1", "http"))
    assert seen == ["a in", "b in", "b out", "a out"]
    assert handler.runs == 1


# The guard -----------------------------------------------------------------------------------------------------------


async def test_a_layer_that_works_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    handler, guard = Counting(), Guard("good", layer(passes), 0, log)
    guarded = wrap(handler, [guard])
    for _ in range(3):
        await guarded(RequestVisit("192.0.2.1", "http"))
    assert handler.runs == 3
    assert not guard.is_off
    assert not caplog.records


@bad
async def test_a_layer_that_breaks_is_reported_once_and_out_of_the_way(
    caplog: pytest.LogCaptureFixture, around: Callable[[Handler, Visit], Awaitable[None]]
) -> None:
    handler, guard = Counting(), Guard("bad", layer(around), 0, log)
    guarded = wrap(handler, [guard])
    for number in range(1, 5):
        visit = RequestVisit("192.0.2.1", "http")
        await guarded(visit)
        assert visit.outcome == "ok"
        assert handler.runs == number
    assert guard.is_off
    (fields,) = reports(caplog)
    assert fields["layer"] == "bad"
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].getMessage() == "layer switched off"


@pytest.mark.parametrize("around", [*BAD, passes, swallows_errors, raises_a_cause], ids=lambda around: around.__name__)
async def test_the_handlers_own_error_passes_unchanged(
    caplog: pytest.LogCaptureFixture, around: Callable[[Handler, Visit], Awaitable[None]]
) -> None:
    error = HandlerError("mine")
    handler, guard = Counting(error), Guard("some", layer(around), 0, log)
    guarded = wrap(handler, [guard])
    for number in (1, 2):
        with pytest.raises(HandlerError) as caught:
            await guarded(RequestVisit("192.0.2.1", "http"))
        assert caught.value is error
        assert handler.runs == number
    assert len(caplog.records) == (0 if around is passes or around in LATER else 1)


async def test_a_layer_that_breaks_while_the_handler_runs(caplog: pytest.LogCaptureFixture) -> None:
    """It cancels the handler from within: that much it can do, but the handler is never run again."""
    runs = 0

    async def slow(visit: Visit) -> None:
        nonlocal runs
        runs += 1
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        visit.outcome = "ok"

    guarded = wrap(slow, [Guard("bad", layer(raises_in_the_middle), 0, log)])
    visit = RequestVisit("192.0.2.1", "http")
    with pytest.raises(RuntimeError, match="layer bad cancelled the handler"):
        await guarded(visit)
    assert runs == 1
    assert len(caplog.records) == 1
    visit = RequestVisit("192.0.2.1", "http")
    await guarded(visit)
    assert (runs, visit.outcome) == (2, "ok")


async def test_a_layers_own_time_out_does_not_leave_its_scope(
    caplog: pytest.LogCaptureFixture, autojump_clock: object
) -> None:
    """A stray Cancelled would end every task up to the program."""

    async def times_out(handler: Handler, visit: Visit) -> None:
        with trio.move_on_after(1):
            await handler(visit)

    async def waits(visit: Visit) -> None:
        await trio.sleep_forever()

    guarded = wrap(waits, [Guard("impatient", layer(times_out), 0, log)])
    with pytest.raises(RuntimeError, match="layer impatient cancelled the handler"):
        await guarded(RequestVisit("192.0.2.1", "http"))
    assert len(caplog.records) == 1


async def test_a_layer_that_breaks_under_a_cancellation_does_not_stop_it(caplog: pytest.LogCaptureFixture) -> None:
    async def waits(visit: Visit) -> None:
        await trio.sleep_forever()

    guarded = wrap(waits, [Guard("bad", layer(raises_over_an_error), 0, log)])
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded, RequestVisit("192.0.2.1", "http"))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert len(caplog.records) == 1


def test_a_layer_that_raises_when_it_is_put_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(handler: Handler) -> Handler:
        raise LayerError("when put on")

    handler, guard = Counting(), Guard("bad", broken, 0, log)
    assert wrap(handler, [guard]) is handler
    assert guard.is_off
    assert reports(caplog) == [{"layer": "bad", "error": "LayerError: when put on"}]


async def test_a_cancellation_passes_and_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def waits(visit: Visit) -> None:
        await trio.sleep_forever()

    guard = Guard("good", layer(passes), 0, log)
    guarded = wrap(waits, [guard])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guarded, RequestVisit("192.0.2.1", "http"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert not guard.is_off
    assert not caplog.records


async def test_a_cancellation_in_the_layer_itself_passes(caplog: pytest.LogCaptureFixture) -> None:
    async def waits_first(handler: Handler, visit: Visit) -> None:
        await trio.sleep_forever()

    handler, guard = Counting(), Guard("slow", layer(waits_first), 0, log)
    guarded = wrap(handler, [guard])
    with trio.CancelScope() as scope:
        scope.cancel()
        await guarded(RequestVisit("192.0.2.1", "http"))
    assert scope.cancelled_caught
    assert handler.runs == 0
    assert not caplog.records


@bad
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("error", [None, HandlerError("mine")], ids=["ok", "raises"])
async def test_the_other_layers_go_on(
    caplog: pytest.LogCaptureFixture,
    around: Callable[[Handler, Visit], Awaitable[None]],
    depth: int,
    error: HandlerError | None,
) -> None:
    seen: list[str] = []

    async def notes(handler: Handler, visit: Visit) -> None:
        seen.append("in")
        try:
            await handler(visit)
        finally:
            seen.append("out")

    handler = Counting(error)
    arounds: list[Callable[[Handler, Visit], Awaitable[None]]] = [notes, notes, notes]
    arounds[depth] = around
    guards = [Guard(str(at), layer(one), at, log) for at, one in enumerate(arounds)]
    guarded = wrap(handler, guards)
    for number in (1, 2):
        if error is None:
            await guarded(RequestVisit("192.0.2.1", "http"))
        else:
            with pytest.raises(HandlerError):
                await guarded(RequestVisit("192.0.2.1", "http"))
        assert handler.runs == number
        assert sorted(seen) == ["in"] * 2 * number + ["out"] * 2 * number
    assert [guard.is_off for guard in guards] == [
        at == depth and not (around in LATER and error is not None) for at in range(3)
    ]
