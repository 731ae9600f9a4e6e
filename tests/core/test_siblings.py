"""A worker's side of what the supervisor counts."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from tunnel.core.board import make_board
from tunnel.core.registry import Registry
from tunnel.core.roster import Roster
from tunnel.core.siblings import Siblings
from tunnel.errors import Refused
from tunnel.workers.channel import Channel
from tunnel.workers.member import Member


def make_siblings(channel: Channel, board: int) -> Siblings:
    orders = {"core": "c", "names": [], "key": b"k" * 16}
    member = SimpleNamespace(number=0, orders=orders, files=[board], channel=channel, on=channel.on)
    return Siblings(cast(Member, member), cast(Registry, SimpleNamespace()), 2)


async def test_a_link_that_was_given_up_while_it_was_admitted_is_not_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The supervisor stands still for longer than the worker waits, and counts it after that."""
    roster = Roster(60)
    admitted: list[Any] = []

    def admit(message: Any, files: list[int]) -> Any:
        admitted.append(message)
        return roster.admit(0, *message)

    ours, theirs = socket.socketpair()
    handlers = {
        "admit": admit,
        "drop": lambda message, files: roster.drop(message),
        "sync": lambda message, files: None,
    }
    worker, supervisor = Channel(ours, {}), Channel(theirs, handlers)
    board = make_board(2)
    siblings = make_siblings(worker, board)
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.run)
        with trio.move_on_after(5) as scope:
            await siblings.admit("acme", "one", "c1", 1, 10)
        assert scope.cancelled_caught
        await nursery.start(supervisor.run)
        await worker.call("sync")
        assert len(admitted) == 1 and roster.by_account == {}
        await siblings.admit("acme", "two", "c2", 1, 10)  # the account's only place
        with pytest.raises(Refused, match="limit of 1 agent"):
            await siblings.admit("acme", "three", "c3", 1, 10)
        assert roster.by_account == {"acme": 1}
        worker.close()
        supervisor.close()
        with pytest.raises(Refused, match="gone"):
            await siblings.admit("acme", "four", "c4", 1, 10)
    os.close(board)
