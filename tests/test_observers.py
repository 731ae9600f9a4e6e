"""Observers folded into one coroutine do what each does as a layer by itself, and break as harmlessly as any layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import trio
import trio.testing

from tunnel.config.load import sections
from tunnel.config.settings import AgentSettings, CoreSettings
from tunnel.handler import (
    Begin,
    ConnectVisit,
    End,
    Ended,
    Guard,
    Handler,
    Layer,
    Leave,
    LinkVisit,
    LocalVisit,
    Observer,
    QueryVisit,
    RequestVisit,
    StreamVisit,
    Visit,
    wrap,
)
from tunnel.observers import MOST, MOST_WAITING, PAUSE, SOME, Observers, fold, only_observers
from tunnel.plugins import Program

log = logging.getLogger("tunnel.plugins")
KINDS = ("connect", "link", "stream", "request", "local", "query")


class HandlerError(Exception):
    pass


def a_visit(kind: str) -> Visit:
    connect, stream = ConnectVisit("192.0.2.1:1"), StreamVisit(None, "http")
    made = {
        "connect": connect,
        "link": LinkVisit(connect),
        "stream": stream,
        "request": RequestVisit("192.0.2.1", "http"),
        "local": LocalVisit(stream, "localhost:3000", "http"),
        "query": QueryVisit("token.find", "sqlite"),
    }
    return made[kind]


def noting(name: str, seen: list[str], breaks_in: str = "") -> Observer:
    """Notes what it is called for; raises in "begin" or "end"."""

    def begin(visit: Visit) -> None:
        seen.append(f"{name} begin {visit.kind}")
        if breaks_in == "begin":
            raise ValueError("in begin")

    def end(visit: Visit, raised: BaseException | None) -> None:
        seen.append(f"{name} end {visit.kind} {type(raised).__name__}")
        if breaks_in == "end":
            raise ValueError("in end")

    begins: dict[str, Begin] = dict.fromkeys(KINDS, begin)
    ends: dict[str, End] = dict.fromkeys(KINDS, end)
    return Observer(begins, ends)


def guards(*layers: Layer) -> list[Guard]:
    return [Guard(str(at), layer, at, log) for at, layer in enumerate(layers)]


def handler_that(seen: list[str], error: Exception | None = None) -> Handler:
    async def handle(visit: Visit) -> None:
        seen.append("handler")
        if error is not None:
            raise error

    return handle


async def run(layers: Sequence[Layer], error: Exception | None, seen: list[str], kind: str = "request") -> None:
    if error is None:
        await wrap(handler_that(seen), layers)(a_visit(kind))
        return
    with pytest.raises(HandlerError) as caught:
        await wrap(handler_that(seen, error), layers)(a_visit(kind))
    assert caught.value is error


@pytest.mark.parametrize("error", [None, HandlerError("mine")], ids=["ok", "raises"])
@pytest.mark.parametrize("kind", KINDS)
async def test_folded_or_one_by_one_it_is_the_same(kind: str, error: HandlerError | None) -> None:
    apart: list[str] = []
    await run([noting("a", apart), noting("b", apart)], error, apart, kind)
    together: list[str] = []
    layers = fold(guards(noting("a", together), noting("b", together)))
    assert len(layers) == 1 and isinstance(layers[0], Observers)
    await run(layers, error, together, kind)
    how = type(error).__name__
    order = [f"a begin {kind}", f"b begin {kind}", "handler", f"b end {kind} {how}", f"a end {kind} {how}"]
    assert apart == together == order


@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("error", [None, HandlerError("mine")], ids=["ok", "raises"])
async def test_one_that_breaks_is_reported_once_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, where: str, depth: int, error: HandlerError | None
) -> None:
    seen: list[str] = []
    all_guards = guards(*(noting(str(at), seen, where if at == depth else "") for at in range(3)))
    layers = fold(all_guards)
    for _ in range(3):
        await run(layers, error, seen)
    calls = [line.split()[0] for line in seen]
    assert calls.count("handler") == 3
    assert calls.count(str(depth)) == (1 if where == "begin" else 2)  # in the first visit only
    assert all(calls.count(str(at)) == 6 for at in range(3) if at != depth)
    assert [guard.is_off for guard in all_guards] == [at == depth for at in range(3)]
    [record] = caplog.records
    assert record.getMessage() == "layer switched off"
    assert record.fields == {"layer": str(depth), "error": f"ValueError: in {where}"}  # type: ignore[attr-defined]


async def test_switched_off_is_off_around_every_handler() -> None:
    seen: list[str] = []
    layers = fold(guards(noting("bad", seen, "begin"), noting("good", seen)))
    requests, streams = wrap(handler_that(seen), layers), wrap(handler_that(seen), layers)
    await requests(a_visit("request"))
    await streams(a_visit("stream"))
    assert [line for line in seen if line.startswith("bad")] == ["bad begin request"]


async def test_other_layers_keep_their_place() -> None:
    seen: list[str] = []

    def around(handler: Handler) -> Handler:
        async def layered(visit: Visit) -> None:
            seen.append("layer in")
            await handler(visit)
            seen.append("layer out")

        return layered

    layers = fold(guards(noting("a", seen), noting("b", seen), around, noting("c", seen)))
    assert len(layers) == 3
    await run(layers, None, seen)
    begins = ["a begin request", "b begin request", "layer in", "c begin request"]
    assert seen == [*begins, "handler", "c end request NoneType", "layer out", "b end request NoneType",
                    "a end request NoneType"]  # fmt: skip


async def test_a_cancellation_is_told_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    async def waits(visit: Visit) -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        scope.cancel()
        await wrap(waits, fold(guards(noting("a", seen))))(a_visit("request"))
    assert scope.cancelled_caught
    assert seen == ["a begin request", "a end request Cancelled"]
    assert not caplog.records


def telling_late(seen: list[str], breaks: bool = False) -> Observer:
    def told(visit: Visit, raised: BaseException | None) -> None:
        seen.append(f"{visit.status} {type(raised).__name__} {visit.ended >= visit.started}")
        if breaks:
            raise ValueError("late")

    return Observer({}, {}, {"request": told})


async def visited(handler: Handler, number: int) -> None:
    visit = a_visit("request")
    visit.status = number
    await handler(visit)


async def test_late_observers_are_told_in_order_and_soon(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[str] = []
    (layer,) = fold(guards(telling_late(seen), telling_late(seen)))
    assert isinstance(layer, Observers)
    handler = wrap(handler_that([]), [layer])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(layer.run)
        for number in range(3):
            await visited(handler, number)
        assert seen == []
        await trio.sleep(2 * PAUSE)
        assert seen == [f"{number} NoneType True" for number in (0, 1, 2)] * 2
        await visited(handler, 3)
        layer.settle()
        assert seen[6:] == ["3 NoneType True"] * 2
        await trio.sleep(2 * PAUSE)
        assert len(seen) == 8  # nobody is told twice
        nursery.cancel_scope.cancel()


async def test_a_burst_is_told_before_it_is_long() -> None:
    seen: list[str] = []
    (layer,) = fold(guards(telling_late(seen)))
    handler = wrap(handler_that([]), [layer])
    for number in range(MOST + 1):
        await visited(handler, number)
    assert len(seen) == MOST


async def test_where_idle_time_is_known_they_wait_for_it_but_not_for_ever() -> None:
    seen: list[str] = []
    (layer,) = fold(guards(telling_late(seen)))
    assert isinstance(layer, Observers)
    handler = wrap(handler_that([]), [layer])
    asked: list[Callable[[], None]] = []

    def when_idle(work: Callable[[], None]) -> bool:
        asked.append(work)
        return True

    layer.when_idle = when_idle
    for number in range(MOST):
        await visited(handler, number)
        assert len(asked) == (number >= SOME - 1)
    assert seen == []
    asked.pop()()
    assert len(seen) == MOST
    for number in range(MOST_WAITING):
        assert len(seen) == MOST
        await visited(handler, number)
    assert len(seen) == MOST + MOST_WAITING
    asked.pop()()  # too late
    assert len(seen) == MOST + MOST_WAITING


async def test_where_that_is_not_known_after_all_they_do_not_wait() -> None:
    seen: list[str] = []
    (layer,) = fold(guards(telling_late(seen)))
    assert isinstance(layer, Observers)
    layer.when_idle = lambda work: False
    handler = wrap(handler_that([]), [layer])
    for number in range(MOST):
        await visited(handler, number)
    assert len(seen) == MOST


async def test_a_late_observer_hears_what_was_raised() -> None:
    seen: list[str] = []
    (layer,) = fold(guards(telling_late(seen)))
    assert isinstance(layer, Observers)
    with pytest.raises(HandlerError):
        await visited(wrap(handler_that([], HandlerError("mine")), [layer]), 5)
    layer.settle()
    assert seen == ["5 HandlerError True"]


async def test_a_late_observer_that_breaks_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    broken: list[str] = []
    sound: list[str] = []
    (layer,) = fold(guards(telling_late(broken, breaks=True), telling_late(sound)))
    assert isinstance(layer, Observers)
    handler = wrap(handler_that([]), [layer])
    for number in range(3):
        await visited(handler, number)
    layer.settle()
    await visited(handler, 3)
    layer.settle()
    assert (len(broken), len(sound)) == (1, 4)
    assert [record.getMessage() for record in caplog.records] == ["layer switched off"]


async def test_a_batch_is_told_in_one_call_and_what_it_raises_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[list[tuple[int, str]]] = []

    def batch(visits: Sequence[Ended]) -> None:
        seen.append([(visit.status, type(raised).__name__) for visit, raised in visits])
        if len(seen) == 2:
            raise ValueError("late")

    def told(visit: Visit, raised: BaseException | None) -> None:
        raise AssertionError("there is a batch")

    alone: list[str] = []
    (layer,) = fold(guards(Observer({}, {}, {"request": told}, batch), telling_late(alone)))
    assert isinstance(layer, Observers)
    handler = wrap(handler_that([]), [layer])
    await visited(handler, 0)
    with pytest.raises(HandlerError):
        await visited(wrap(handler_that([], HandlerError("mine")), [layer]), 1)
    layer.settle()
    layer.settle()
    assert seen == [[(0, "NoneType"), (1, "HandlerError")]]
    for number in (2, 3):
        await visited(handler, number)
        layer.settle()
    assert len(seen) == 2 and len(alone) == 4
    assert [record.getMessage() for record in caplog.records] == ["layer switched off"]


async def test_by_itself_an_observer_tells_at_once() -> None:
    seen: list[str] = []
    await visited(wrap(handler_that([]), [telling_late(seen)]), 1)
    assert seen == ["1 NoneType True"]


# What is entered ------------------------------------------------------------------------------------------------------


def entering(name: str, seen: list[str], breaks_in: str = "") -> Observer:
    """Has something around local requests in the handler's own task; raises in "enter" or "leave"."""

    def enter(visit: Visit) -> Leave:
        seen.append(f"{name} enters in {trio.lowlevel.current_task().name}")
        if breaks_in == "enter":
            raise ValueError("in enter")
        return leave

    def leave() -> None:
        seen.append(f"{name} leaves in {trio.lowlevel.current_task().name}")
        if breaks_in == "leave":
            raise ValueError("in leave")

    seeing = noting(name, seen)
    return Observer(seeing.begins, seeing.ends, enters={"local": enter})


@pytest.mark.parametrize("error", [None, HandlerError("mine")], ids=["ok", "raises"])
async def test_what_is_entered_is_around_the_handler_in_its_task(error: HandlerError | None) -> None:
    task = trio.lowlevel.current_task().name
    end = f"end local {type(error).__name__}"
    apart: list[str] = []
    await run([entering("a", apart)], error, apart, "local")
    assert apart == ["a begin local", f"a enters in {task}", "handler", f"a leaves in {task}", f"a {end}"]
    alone: list[str] = []
    await run(fold(guards(entering("a", alone))), error, alone, "local")
    assert alone == apart
    seen: list[str] = []
    layers = fold(guards(entering("a", seen), noting("b", seen), entering("c", seen)))
    await run(layers, error, seen, "local")
    enters = [f"a enters in {task}", f"c enters in {task}"]
    leaves = [f"c leaves in {task}", f"a leaves in {task}"]
    begins = ["a begin local", "b begin local", "c begin local"]
    assert seen == [*begins, *enters, "handler", *leaves, f"c {end}", f"b {end}", f"a {end}"]
    seen.clear()
    await run(layers, error, seen, "request")  # nobody enters those
    assert not any("enters" in one or "leaves" in one for one in seen)


async def test_a_visit_without_a_task_is_entered_by_the_one_that_goes_on_with_it() -> None:
    seen: list[str] = []
    (observers,) = fold(guards(entering("a", seen)))
    assert isinstance(observers, Observers)
    visit = a_visit("local")
    observers.begin(visit)
    observers.end(visit, None)
    assert seen == ["a begin local", "a end local NoneType"]
    seen.clear()
    observers.begin(visit)
    await observers.go_on(handler_that(seen))(visit)
    task = trio.lowlevel.current_task().name
    assert seen == [
        "a begin local", f"a enters in {task}", "handler", f"a leaves in {task}", "a end local NoneType",
    ]  # fmt: skip


@pytest.mark.parametrize("breaks_in", ["enter", "leave"])
async def test_one_that_breaks_there_is_switched_off(breaks_in: str) -> None:
    seen: list[str] = []
    broken, fine = guards(entering("a", seen, breaks_in), entering("b", seen))
    layers = fold([broken, fine])
    await run(layers, None, seen, "local")
    assert broken.is_off and not fine.is_off
    assert seen.count("handler") == 1
    assert [one for one in seen if one.startswith("b")][-1] == "b end local NoneType"
    seen.clear()
    await run(layers, None, seen, "local")
    assert not any(one.startswith("a") for one in seen)


def test_only_observers_can_be_called_by_hand() -> None:
    assert isinstance(only_observers([]), Observers)
    layers = fold(guards(noting("a", []), noting("b", [])))
    assert only_observers(layers) is layers[0]

    def layer(handler: Handler) -> Handler:
        return handler

    assert only_observers(fold(guards(noting("a", []), layer))) is None
    assert only_observers(fold(guards(layer))) is None


@pytest.mark.parametrize(("role", "settings"), [("core", CoreSettings()), ("agent", AgentSettings())])
async def test_all_layers_that_are_on_by_default_only_observe(
    role: str, settings: CoreSettings | AgentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that needs a coroutine would take the quick way from every request (core/quick.py, agent/quick.py)."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    program = Program(role, sections(settings), cast(Any, None), list)
    handlers = logging.root.handlers[:]
    async with trio.open_nursery() as nursery:
        async with program.plugged_in(settings.layers, nursery) as layers:
            assert only_observers(layers) is not None
        nursery.cancel_scope.cancel()
    assert logging.root.handlers == handlers
