"""A plug-in that breaks, wherever it does, is reported once and costs no more than itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import pytest
import trio

from tunnel.errors import ConfigError
from tunnel.handler import Host, Layer, Observer, RequestVisit, Visit, wrap
from tunnel.plugins import Program, find

Body = Callable[[Host], AsyncIterator[Layer]]


@pytest.fixture
def program() -> Program:
    return Program("core", {}, cast(Any, None), list)


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[[Body], Sequence[str]]:
    """Makes a plug-in of an async generator, and tells how `layers` names it."""

    def make(body: Body) -> Sequence[str]:
        module = ModuleType("tests_plugin")
        vars(module)["it"] = asynccontextmanager(body)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return ["tests_plugin:it"]

    return make


async def handler(visit: Visit) -> None:
    visit.outcome = "ok"


def errors(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    return [(record.getMessage(), vars(record)["fields"]) for record in caplog.records if record.levelname == "ERROR"]


async def test_a_task_that_raises_switches_its_plug_in_off(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Visit] = []
    breaks = trio.Event()

    async def task() -> None:
        await breaks.wait()
        raise KeyError("a bug")

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        host.nursery.start_soon(task)
        host.nursery.start_soon(task)
        yield Observer({"request": seen.append}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery) as layers:
        handle = wrap(handler, layers)
        await handle(RequestVisit("192.0.2.1:1", "http"))
        breaks.set()
        await trio.testing.wait_all_tasks_blocked()
        await handle(RequestVisit("192.0.2.1:1", "http"))
    assert len(seen) == 1
    fields = {"layer": "tests_plugin:it", "error": "KeyError: 'a bug'"}
    assert errors(caplog) == [("layer switched off", fields)]


async def test_a_task_may_break_before_the_layer_is_there(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    async def task() -> None:
        raise KeyError("a bug")

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        host.nursery.start_soon(task)
        await trio.testing.wait_all_tasks_blocked()
        yield Observer({"request": lambda visit: pytest.fail("it is off")}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery) as layers:
        await wrap(handler, layers)(RequestVisit("192.0.2.1:1", "http"))
    assert [what for what, _ in errors(caplog)] == ["layer switched off"]


async def test_a_task_that_breaks_when_it_is_cancelled(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled and a bug arrive as a group: the program ends as it would have."""

    async def breaks() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("a bug")

    async def task() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(breaks)
            nursery.start_soon(trio.sleep_forever)

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        host.nursery.start_soon(task)
        yield Observer({}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery):
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [what for what, _ in errors(caplog)] == ["layer switched off"]


async def test_a_task_that_is_waited_for(program: Program, plug: Callable[[Body], Sequence[str]]) -> None:
    """What it raises before it has started is the plug-in's to handle, later it is a task's like any other."""
    goes_on = trio.Event()

    async def task(is_good: bool, *, task_status: trio.TaskStatus[str]) -> None:
        if is_good:
            task_status.started("begun")
            await goes_on.wait()
        raise KeyError("a bug")

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        with pytest.raises(KeyError):
            await host.nursery.start(task, False)
        assert await host.nursery.start(task, True) == "begun"
        yield Observer({}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery) as layers:
        goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(layers) == 1


async def test_functions_that_raise_are_said_to_and_reported_once(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def breaks() -> Any:
        raise KeyError("a\nbug")

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        host.set_details("mine", breaks)
        host.set_report(breaks)
        host.checks["broken"] = breaks
        host.checks["wrong"] = lambda: cast(Any, True)
        host.checks["fine"] = lambda: (True, "well")
        yield Observer({}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery):
        for _ in range(2):
            assert program.details() == {"mine": {"unavailable": "KeyError: 'a\\nbug'"}}
            said = program.readiness()
            assert program.make_report is not None and program.make_report() == b""
    assert said["broken"] == {"ok": False, "reason": "the check broke: KeyError: 'a\\nbug'"}
    assert not said["wrong"]["ok"] and said["fine"] == {"ok": True, "reason": "well"}
    assert [(what, fields.get("function", fields.get("check"))) for what, fields in errors(caplog)] == [
        ("plug-in's function broke", "details of mine"), ("a check broke", "broken"), ("a check broke", "wrong"),
        ("plug-in's function broke", "report"),
    ]  # fmt: skip


async def test_details_that_are_no_plain_values_are_shown_as_text(
    program: Program, plug: Callable[[Body], Sequence[str]]
) -> None:
    async def plugin(host: Host) -> AsyncIterator[Layer]:
        host.set_details("mine", lambda: {"path": Path("/tmp"), "error": KeyError("x"), "n": 1, "nan": float("nan")})
        host.set_details("worse", lambda: {"text": "\ud800"})
        host.set_details("no section", lambda: cast(Any, [1]))
        yield Observer({}, {})

    async with trio.open_nursery() as nursery, program.plugged_in(plug(plugin), nursery):
        details = program.details()
    assert details["mine"] == {"path": "/tmp", "error": "'x'", "n": 1, "nan": None}
    assert list(details["worse"]) == list(details["no section"]) == ["unavailable"]
    msgspec.msgpack.encode(details)


@pytest.mark.parametrize("is_failing", [False, True])
async def test_a_plug_in_that_breaks_while_it_ends(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture, is_failing: bool
) -> None:
    """What the program itself raises comes out, not the plug-in's."""

    async def plugin(host: Host) -> AsyncIterator[Layer]:
        try:
            yield Observer({}, {})
        finally:
            raise KeyError("a bug")

    async def run() -> None:
        async with program.plugged_in(plug(plugin), nursery):
            if is_failing:
                raise ConfigError("the program's own")

    async with trio.open_nursery() as nursery:
        if is_failing:
            with pytest.raises(ConfigError, match="own"):
                await run()
        else:
            await run()
    fields = {"plugin": "tests_plugin:it", "error": "KeyError: 'a bug'"}
    assert errors(caplog) == [("plug-in broke while it ended", fields)]


async def test_a_plug_in_cannot_take_the_programs_error_away(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    async def plugin(host: Host) -> AsyncIterator[Layer]:
        try:
            yield Observer({}, {})
        except BaseException:
            pass

    async with trio.open_nursery() as nursery:
        with pytest.raises(ConfigError, match="own"):
            async with program.plugged_in(plug(plugin), nursery):
                raise ConfigError("the program's own")
        with trio.CancelScope() as scope:
            async with program.plugged_in(plug(plugin), nursery):
                scope.cancel()
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert errors(caplog) == []


async def test_a_supervisors_half_is_as_harmless(
    program: Program, plug: Callable[[Body], Sequence[str]], caplog: pytest.LogCaptureFixture
) -> None:
    async def task() -> None:
        raise KeyError("a bug")

    async def supervise(host: Host) -> AsyncIterator[None]:
        host.nursery.start_soon(task)
        yield
        raise KeyError("another bug")

    names = plug(cast(Body, supervise))
    module = sys.modules["tests_plugin"]
    module.supervise = module.it
    module.it.__module__ = "tests_plugin"
    async with trio.open_nursery() as nursery, program.supervised(names, nursery):
        await trio.testing.wait_all_tasks_blocked()
    assert [what for what, _ in errors(caplog)] == ["layer switched off", "plug-in broke while it ended"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("def (", "SyntaxError: invalid syntax"),
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("", "has no attribute 'it'"),
    ],
)
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = f"tests_bad_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find(f"{name}:it")
    said = str(caught.value)
    assert said.startswith(f"layers: can't load '{name}:it' (") and says in said and "\n" not in said
