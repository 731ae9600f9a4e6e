"""The run loop that asks for our sockets itself: what it does before it writes and before it sleeps, and how it is
put in front of Trio's and taken away again."""

import select
import signal
import socket as stdlib_socket
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import trio
import trio.lowlevel
from readypair import Pair
from trio.testing import wait_all_tasks_blocked

from tunnel import front
from tunnel.front import LOOKS
from tunnel.net import Socket
from tunnel.ready import Ready

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is none without epoll, and nothing uses it")


@pytest.fixture
def problems() -> list[Exception]:
    return []


@pytest.fixture
async def in_front(nursery: trio.Nursery, problems: list[Exception]) -> Ready:
    made = Ready(problems.append)
    nursery.start_soon(made.run)
    await wait_all_tasks_blocked()
    return made


async def test_who_becomes_ready_meanwhile_is_told_before_what_comes_after(in_front: Ready) -> None:
    order: list[str] = []
    first, second = Pair(in_front), Pair(in_front)

    def begin(has_ended: bool) -> None:
        order.append("first")
        in_front.after(lambda: order.append("after"))
        second.far.send(b"x")

    def go_on(has_ended: bool) -> None:
        order.append("second")
        in_front.after(lambda: order.append("after"))

    in_front._told[first.near.sock.fileno()] = begin
    in_front._told[second.near.sock.fileno()] = go_on
    first.far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert order == ["first", "second", "after", "after"]
    in_front._told.clear()
    first.close()
    second.close()


async def test_arrivals_without_end_do_not_hold_that_up(in_front: Ready) -> None:
    pair = Pair(in_front)
    order: list[str] = []

    def again(has_ended: bool) -> None:
        pair.near.recv_nowait()
        if len(order) < 100:
            order.append("told")
            pair.far.send(b"x")
            in_front.after(lambda: order.append("after"))

    in_front._told[pair.near.sock.fileno()] = again
    pair.far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert order[: 2 * (LOOKS + 1)] == ["told"] * (LOOKS + 1) + ["after"] * (LOOKS + 1)
    pair.close()


async def test_nor_does_it_wait_for_others_when_a_task_can_run(in_front: Ready) -> None:
    order: list[str] = []
    event = trio.Event()
    pair = Pair(in_front)

    def again(has_ended: bool) -> None:
        pair.near.recv_nowait()
        if not event.is_set():
            pair.far.send(b"x")
            in_front.after(lambda: order.append("after"))
            event.set()
        else:
            order.append("again")

    in_front._told[pair.near.sock.fileno()] = again
    pair.far.send(b"x")
    with trio.fail_after(5):
        await event.wait()
        order.append("task")
        await wait_all_tasks_blocked(0.01)
    assert order == ["after", "task", "again"]
    pair.close()


def asking(ready: Ready, pair: Pair, work: Callable[[], None]) -> None:
    """Ask for it where most ask: while the socket's function is told."""

    def hear(has_ended: bool) -> None:
        pair._hear(has_ended)
        assert ready.when_idle(work)

    ready._told[pair.near.sock.fileno()] = hear
    pair.far.send(b"x")


async def test_what_waits_for_idle_time_is_done_once_when_all_are_told(in_front: Ready) -> None:
    first, second = Pair(in_front), Pair(in_front)
    got: list[int] = []
    asking(in_front, first, lambda: got.append(len(second.got)))
    second.far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    await wait_all_tasks_blocked(0.01)
    assert got == [1]
    first.close()
    second.close()


async def test_it_waits_while_others_are_served(in_front: Ready) -> None:
    pair, busy, done = Pair(in_front), Pair(in_front), trio.Event()
    seen: list[bool] = []

    def again(has_ended: bool) -> None:
        busy.near.recv_nowait()
        seen.append(done.is_set())
        if len(seen) < 20 * LOOKS:
            busy.far.send(b"x")

    in_front._told[busy.near.sock.fileno()] = again
    busy.far.send(b"x")
    asking(in_front, pair, done.set)
    with trio.fail_after(5):
        await done.wait()
    assert pair.got and seen == [False] * 20 * LOOKS
    pair.close()
    in_front._told.clear()
    busy.close()


async def test_what_is_asked_for_again_and_again_is_done_once(in_front: Ready) -> None:
    """A program that never sleeps must not gather it."""
    pair, done = Pair(in_front), []

    def work() -> None:
        done.append(len(in_front._idle))

    def hear(has_ended: bool) -> None:
        pair._hear(has_ended)
        for _ in range(100):
            assert in_front.when_idle(work)
        assert len(in_front._idle) == 1

    in_front._told[pair.near.sock.fileno()] = hear
    pair.far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert done == [0]
    pair.close()


async def test_it_may_wake_a_task_or_move_a_deadline(in_front: Ready) -> None:
    pair, event = Pair(in_front), trio.Event()
    asking(in_front, pair, event.set)
    with trio.fail_after(5):
        await event.wait()
    with trio.fail_after(5), trio.move_on_after(60) as scope:

        def hurry() -> None:
            scope.deadline = trio.current_time() + 0.05

        asking(in_front, pair, hurry)
        await trio.sleep_forever()
    assert scope.cancelled_caught
    pair.close()


async def test_only_one_stands_in_front_and_leaves_no_trace(nursery: trio.Nursery) -> None:
    runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
    before = runner.io_manager
    first, second = Ready(pytest.fail), Ready(pytest.fail)
    async with trio.open_nursery() as inner:
        inner.start_soon(first.run)
        await wait_all_tasks_blocked()
        inner.start_soon(second.run)
        await wait_all_tasks_blocked()
        assert (first.is_in_front, second.is_in_front) == (True, False)
        pairs = [Pair(first), Pair(second)]
        for pair in pairs:
            pair.far.send(b"x")
        await wait_all_tasks_blocked(0.01)
        assert [pair.got for pair in pairs] == [[b"x"], [b"x"]]
        assert trio.lowlevel.current_statistics().io_statistics.backend == "epoll"
        inner.cancel_scope.cancel()
    assert runner.io_manager is before
    for pair in pairs:
        pair.close()


async def test_with_a_trio_that_looks_otherwise_inside_a_task_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "trio", SimpleNamespace(_core=SimpleNamespace()))
    made = Ready(pytest.fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await wait_all_tasks_blocked()
        assert not made.is_in_front
        pair = Pair(made)
        pair.far.send(b"x")
        await wait_all_tasks_blocked(0.01)
        assert pair.got == [b"x"]
        nursery.cancel_scope.cancel()
    pair.close()


def test_ctrl_c_comes_to_the_program_not_into_a_function() -> None:
    """Trio turns SIGINT into KeyboardInterrupt where no protected code runs; a function of ours is protected."""
    order: list[str] = []

    async def main() -> None:
        made = Ready(pytest.fail)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            await wait_all_tasks_blocked()
            near, far = stdlib_socket.socketpair()
            near.setblocking(False)

            def interrupt(has_ended: bool) -> None:
                if not order:
                    order.append("begun")
                    signal.raise_signal(signal.SIGINT)
                    order.append("done")

            socket = Socket(near)
            made.add(socket, interrupt)
            far.send(b"x")
            try:
                await trio.sleep(5)
            finally:
                socket.close()
                far.close()
            nursery.cancel_scope.cancel()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell has put behind
    try:
        with pytest.raises(BaseExceptionGroup) as raised:
            trio.run(main, strict_exception_groups=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.group_contains(KeyboardInterrupt)
    assert order == ["begun", "done"]
