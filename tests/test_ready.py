"""Functions told of what is readable: each arrival once, the end, our own closing, and what comes after.

Both where the run loop asks for it and where a task does; what only the run loop can do: test_front.py.
"""

import select
import socket as stdlib_socket
import time
from collections.abc import Iterator

import pytest
import trio
import trio.lowlevel
from readypair import Pair
from trio.testing import wait_all_tasks_blocked

from tunnel.net import Socket
from tunnel.ready import MOST, Ready, make_ready

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is none without epoll, and nothing uses it")


@pytest.fixture
def problems() -> list[Exception]:
    return []


@pytest.fixture(params=[True, False], ids=["in front", "behind a task"])
async def ready(request: pytest.FixtureRequest, problems: list[Exception], nursery: trio.Nursery) -> Ready:
    made = make_ready(problems.append, request.param)
    assert made is not None
    nursery.start_soon(made.run)
    await wait_all_tasks_blocked()
    assert made.is_in_front is request.param
    return made


@pytest.fixture
def pair(ready: Ready) -> Iterator[Pair]:
    made = Pair(ready)
    yield made
    made.close()


async def test_each_arrival_is_told_once(pair: Pair) -> None:
    await wait_all_tasks_blocked()
    assert pair.told == []
    for number in range(3):
        pair.far.send(b"%d" % number)
        await wait_all_tasks_blocked(0.01)
    assert pair.got == [b"0", b"1", b"2"]
    assert pair.told == [False] * 3


async def test_what_is_there_already_is_told_at_once(ready: Ready) -> None:
    near, far = stdlib_socket.socketpair()
    near.setblocking(False)
    far.send(b"early")
    told: list[bool] = []
    socket = Socket(near)
    ready.add(socket, told.append)
    await wait_all_tasks_blocked(0.01)
    assert told == [False]
    socket.close()
    far.close()


async def test_an_end_that_comes_with_bytes_is_told_with_them(pair: Pair) -> None:
    pair.far.send(b"last")
    pair.far.shutdown(stdlib_socket.SHUT_WR)
    await wait_all_tasks_blocked(0.01)
    assert (pair.told, pair.got) == ([True], [b"last"])
    assert pair.near.recv_nowait() == b""


async def test_an_end_that_comes_later_is_told_then(pair: Pair) -> None:
    pair.far.send(b"last")
    await wait_all_tasks_blocked(0.01)
    pair.far.close()
    await wait_all_tasks_blocked(0.01)
    assert (pair.told, pair.got) == ([False, True], [b"last", b""])


async def test_our_own_closing_is_told_and_nothing_after_it(ready: Ready, pair: Pair) -> None:
    pair.far.send(b"x")
    pair.near.close()
    assert pair.told == [True] and pair.got == []
    await wait_all_tasks_blocked(0.01)
    assert pair.told == [True]
    again = Pair(ready)  # its number may be the same
    again.far.send(b"y")
    await wait_all_tasks_blocked(0.01)
    assert again.got == [b"y"] and pair.told == [True]
    again.close()


async def test_one_closed_by_another_ones_function_is_not_told_of_bytes(ready: Ready) -> None:
    pairs = [Pair(ready) for _ in range(2)]
    told: list[int] = []
    sockets = []
    for number in range(2):
        near, far = stdlib_socket.socketpair()
        near.setblocking(False)
        sockets.append((Socket(near), far))

        def hear(has_ended: bool, number: int = number) -> None:
            told.append(number)
            sockets[1 - number][0].close()

        ready.add(sockets[-1][0], hear)
    for _, far in sockets:
        far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    # The first closes the second, whose own closing it is told of, which closes the first: each once.
    assert sorted(told) == [0, 0, 1]
    for one in pairs:
        one.close()
    for near_end, far in sockets:
        near_end.close()
        far.close()


async def test_one_that_raises_costs_the_others_nothing(ready: Ready, problems: list[Exception]) -> None:
    near, far = stdlib_socket.socketpair()
    near.setblocking(False)
    socket, pair = Socket(near), Pair(ready)

    def fail(has_ended: bool) -> None:
        raise RuntimeError("broken")

    ready.add(socket, fail)
    far.send(b"x")
    pair.far.send(b"y")
    await wait_all_tasks_blocked(0.01)
    assert [str(one) for one in problems] == ["broken"]
    assert pair.got == [b"y"]
    pair.close()
    ready._told.clear()  # its closing would be told, too
    socket.close()
    far.close()


async def test_what_comes_after_comes_when_all_are_told(ready: Ready, problems: list[Exception]) -> None:
    order: list[str] = []
    ends = []

    def hear(has_ended: bool) -> None:
        order.append(f"told {ready.is_telling}")
        ready.after(lambda: order.append(f"after {ready.is_telling}"))

    for _ in range(2):
        near, far = stdlib_socket.socketpair()
        near.setblocking(False)
        ends.append((Socket(near), far))
        ready.add(ends[-1][0], hear)
    for _, far in ends:
        far.send(b"x")
    await wait_all_tasks_blocked(0.01)
    assert order == ["told True", "told True", "after False", "after False"]
    assert not problems
    for near_end, far in ends:
        near_end.close()
        far.close()


async def test_many_at_once(ready: Ready) -> None:
    pairs = [Pair(ready) for _ in range(2 * MOST + 5)]
    for pair in pairs:
        pair.far.send(b"x")
    with trio.fail_after(5):
        while not all(pair.got for pair in pairs):
            await trio.lowlevel.checkpoint()
    for pair in pairs:
        assert pair.got == [b"x"]
        pair.close()


# In front of Trio's wait ---------------------------------------------------------------------------------------------


def settled(pair: Pair) -> trio.Event:
    """Set by the pair's function once something was read."""
    event = trio.Event()
    hear = pair._hear

    def tell(has_ended: bool) -> None:
        hear(has_ended)
        event.set()

    pair.ready._told[pair.near.sock.fileno()] = tell
    return event


async def test_a_function_wakes_a_task_that_waits_for_nothing_else(ready: Ready, pair: Pair) -> None:
    event = settled(pair)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _send_late, pair.far)
            await event.wait()
    assert pair.got == [b"late"]


def _send_late(far: stdlib_socket.socket) -> None:
    time.sleep(0.05)
    far.send(b"late")


async def test_trios_own_sockets_deadlines_and_threads_go_on(ready: Ready, pair: Pair) -> None:
    """While ours are busy all the time."""
    near, far = trio.socket.socketpair()
    with near, far:
        async with trio.open_nursery() as nursery:

            async def keep_busy() -> None:
                while True:
                    pair.far.send(b"x")
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(keep_busy)
            with trio.fail_after(5):
                began = trio.current_time()
                await trio.sleep(0.05)
                assert 0.05 <= trio.current_time() - began < 1
                await far.send(b"trio's")
                assert await near.recv(10) == b"trio's"
                assert await trio.to_thread.run_sync(lambda: "done") == "done"
                with trio.move_on_after(0.01) as scope:
                    await near.recv(1)
                assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
    assert pair.got


async def test_a_function_may_move_a_deadline(ready: Ready, pair: Pair) -> None:
    with trio.fail_after(5), trio.move_on_after(60) as scope:

        def hurry(has_ended: bool) -> None:
            scope.deadline = trio.current_time() + 0.05

        pair.ready._told[pair.near.sock.fileno()] = hurry
        pair.far.send(b"x")
        await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_arrivals_without_end_hold_no_deadline_up(ready: Ready, pair: Pair) -> None:
    """Each function makes the next one's arrival, and no task ever has a turn of its own."""

    def again(has_ended: bool) -> None:
        pair.near.recv_nowait()
        pair.far.send(b"x")

    pair.ready._told[pair.near.sock.fileno()] = again
    pair.far.send(b"x")
    began = trio.current_time()
    with trio.move_on_after(0.1) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - began < 2
    pair.ready._told.clear()


async def test_a_socket_may_be_waited_for_by_a_task_as_well(ready: Ready, pair: Pair) -> None:
    """As a connection's task does where it goes on by itself."""
    heard: list[bool] = []
    pair.ready._told[pair.near.sock.fileno()] = heard.append  # reads nothing
    pair.far.send(b"1")
    with trio.fail_after(5):
        assert await pair.near.recv_later() == b"1"
        pair.far.send(b"2")
        assert await pair.near.recv_later() == b"2"
    assert heard and not any(heard)  # behind a task the second may come with the first


async def test_behind_a_task_nobody_knows_when_that_is(nursery: trio.Nursery) -> None:
    made = Ready(pytest.fail, may_be_in_front=False)
    nursery.start_soon(made.run)
    await wait_all_tasks_blocked()
    assert not made.when_idle(pytest.fail)


async def test_idle_time_is_idle_and_time_with_arrivals_is_not(ready: Ready, pair: Pair) -> None:
    """As `wait_all_tasks_blocked` sees it, and with it the clock that jumps."""
    pair.far.send(b"x")
    await wait_all_tasks_blocked()
    assert pair.got == [b"x"]  # it was there, so it came first
    with trio.fail_after(5):
        await wait_all_tasks_blocked(0.01)


async def test_when_it_is_over_nothing_is_taken_on() -> None:
    made = make_ready(lambda exc: None)
    assert made is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        pair = Pair(made)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    near, far = stdlib_socket.socketpair()
    socket = Socket(near)
    assert not made.add(socket, lambda has_ended: None)
    socket.close()
    far.close()
    pair.close()  # closing one of before is no trouble
