"""Programs that are told to end while they start, and while they drain."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tunnel.__main__ import main as tunnel_main
from tunnel.agent.__main__ import main as agent_main
from tunnel.core.__main__ import main as core_main
from tunnel.interrupts import INTERRUPTED, PERIOD, quietly, say_drain
from tunnel.log import get_logger


def test_a_program_says_how_it_ended() -> None:
    assert quietly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        quietly(lambda: 1 // 0)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])])
def test_ctrl_c_is_no_error(raised: BaseException) -> None:
    def program() -> int:
        raise raised

    assert quietly(program) == INTERRUPTED


def test_ctrl_c_hides_nothing_else() -> None:
    def program() -> int:
        raise BaseExceptionGroup("", [KeyboardInterrupt(), ValueError("a bug")])

    with pytest.raises(BaseExceptionGroup):
        quietly(program)


@pytest.mark.parametrize(
    ("main", "loads"),
    [
        (core_main, "load_core"),
        (agent_main, "load_agent"),
        (lambda argv: tunnel_main(["core", *argv]), "load_core"),
        (lambda argv: tunnel_main(["agent", *argv]), "load_agent"),
    ],
)
def test_ctrl_c_while_a_program_starts(
    main: Callable[[list[str]], int], loads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tunnel.config.{loads}", interrupted)
    assert main([]) == INTERRUPTED


async def test_a_drain_says_how_it_goes(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunnel")
    left = iter((3, 1))
    with trio.move_on_after(2.5 * PERIOD):
        await say_drain(get_logger("tunnel"), lambda: next(left), 30.0)
    said: list[dict[str, Any]] = [vars(one)["fields"] for one in caplog.records]
    assert said == [{"under_way": 3, "left": "25s"}, {"under_way": 1, "left": "20s"}]
