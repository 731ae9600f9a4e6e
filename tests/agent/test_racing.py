"""Tries at one connection: who begins when, who wins, who is left."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from tunnel.agent.racing import HURRY, MOST, Race, Try

Run = Callable[[Try[str]], Awaitable[None]]


class Course:
    """Tries by number: when each began, and those under way now. plan: what each of them does."""

    def __init__(self, *plan: Run) -> None:
        self.began: list[float] = []
        self.now: list[int] = []
        self._plan = plan

    async def run(self, one: Try[str]) -> None:
        number = len(self.began)
        self.began.append(trio.current_time())
        self.now.append(number)
        try:
            await self._plan[min(number, len(self._plan) - 1)](one)
        finally:
            self.now.remove(number)


async def hang(_: Try[str]) -> None:
    await trio.sleep_forever()


def arriving(after: float, name: str, lives: float = 1000.0) -> Run:
    async def run(one: Try[str]) -> None:
        await trio.sleep(after)
        if one.arrive(name):
            await trio.sleep(lives)

    return run


def failing(after: float, text: str) -> Run:
    async def run(_: Try[str]) -> None:
        await trio.sleep(after)
        raise OSError(text)

    return run


async def test_one_try_when_nothing_hangs(autojump_clock: trio.abc.Clock) -> None:
    course = Course(arriving(0.2, "first"))
    async with trio.open_nursery() as nursery:
        assert await Race(nursery, course.run).win() == "first"
        assert len(course.began) == 1 and course.now == [0]  # it lives on
        nursery.cancel_scope.cancel()


async def test_a_new_try_while_the_first_hangs(autojump_clock: trio.abc.Clock) -> None:
    course = Course(hang, arriving(0.1, "second"))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        assert await Race(nursery, course.run).win() == "second"
        assert trio.current_time() - began == pytest.approx(HURRY + 0.1)
        await trio.testing.wait_all_tasks_blocked()
        assert course.now == [1]
        nursery.cancel_scope.cancel()


async def test_a_healed_network_is_found_by_the_next_try(autojump_clock: trio.abc.Clock) -> None:
    """It heals at any moment: who begins after that gets through, who began before never does."""
    for healed in (0.1, 1.4, 1.6, 4.0, 9.0):
        begun = trio.current_time()

        async def run(one: Try[str], at: float = begun + healed) -> None:
            await (arriving(0.3, "there") if trio.current_time() >= at else hang)(one)

        async with trio.open_nursery() as nursery:
            await Race(nursery, run).win()
            assert trio.current_time() - begun - healed <= 2
            nursery.cancel_scope.cancel()


async def test_who_gets_ahead_is_not_hurried(autojump_clock: trio.abc.Clock) -> None:
    async def slow_but_sure(one: Try[str]) -> None:
        for _ in range(4):
            await trio.sleep(HURRY * 0.9)
            one.step()
        one.arrive("slow")

    course = Course(slow_but_sure)
    async with trio.open_nursery() as nursery:
        assert await Race(nursery, course.run).win() == "slow"
    assert len(course.began) == 1


async def test_a_few_at_a_time_and_the_first_keeps_its_place(autojump_clock: trio.abc.Clock) -> None:
    course, seen = Course(arriving(8.9, "first"), hang), set()

    async def watch() -> None:
        while True:
            await trio.sleep(0.4)
            seen.add(len(course.now))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        assert await Race(nursery, course.run).win() == "first"
        assert max(seen) == MOST
        steps = [b - a for a, b in zip(course.began, course.began[1:], strict=False)]
        assert len(steps) == 5 and steps == pytest.approx([HURRY] * 5)
        await trio.testing.wait_all_tasks_blocked()
        assert course.now == [0]
        nursery.cancel_scope.cancel()


async def test_only_one_arrives(autojump_clock: trio.abc.Clock) -> None:
    said: list[bool] = []

    async def together(one: Try[str]) -> None:
        await trio.sleep_until(100.0)
        said.append(one.arrive("it"))
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        assert trio.current_time() < 90
        assert await Race(nursery, together).win() == "it"
    assert said.count(True) == 1


async def test_a_failure_ends_it_only_when_nobody_is_left(autojump_clock: trio.abc.Clock) -> None:
    course = Course(failing(3.1, "late"), failing(0.1, "refused"), arriving(0.1, "third"))
    async with trio.open_nursery() as nursery:
        assert await Race(nursery, course.run).win() == "third"
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="refused"):
            await Race(nursery, Course(failing(0.1, "refused")).run).win()
    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="in the moment"):
            await Race(nursery, Course(failing(HURRY, "in the moment of the next")).run).win()


async def test_a_race_that_is_given_up_leaves_nobody(autojump_clock: trio.abc.Clock) -> None:
    course = Course(hang)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(10):
            await Race(nursery, course.run).win()
    assert course.now == [] and len(course.began) == 7


async def test_what_breaks_the_winner_is_its_nurserys_to_hear(autojump_clock: trio.abc.Clock) -> None:
    async def brief(one: Try[str]) -> None:
        assert one.arrive("it")
        await trio.sleep(1)
        raise ZeroDivisionError("later")

    with pytest.RaisesGroup(ZeroDivisionError):
        async with trio.open_nursery() as nursery:
            assert await Race(nursery, brief).win() == "it"
