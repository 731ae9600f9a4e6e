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
from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Registry
from tunnel.core.roster import Roster
from tunnel.core.siblings import Siblings
from tunnel.errors import Refused
from tunnel.handler import ConnectVisit, LinkVisit
from tunnel.workers.channel import Channel
from tunnel.workers.member import Member


def make_siblings(channel: Channel, board: int, registry: Any = None) -> Siblings:
    orders = {"core": "c", "names": [], "key": b"k" * 16}
    member = SimpleNamespace(number=0, orders=orders, files=[board], channel=channel, on=channel.on)
    return Siblings(cast(Member, member), cast(Registry, registry or SimpleNamespace()), 2)


@pytest.mark.parametrize(
    ("crowd", "is_proxy", "held", "elsewhere"),
    [
        ("192.0.2.1", False, 9, False),
        ("192.0.2.1", False, 10, True),  # its share of this worker's link
        ("192.0.2.2", False, 10, False),
        ("", False, 10, False),
        ("192.0.2.1", True, 10, False),  # of the request before; who asks now is not read yet
        ("192.0.2.2", False, 20, True),  # nobody has room here
    ],
)
def test_who_has_its_share_of_a_link_here_is_passed_on(crowd: str, is_proxy: bool, held: int, elsewhere: bool) -> None:
    registry = Registry("example.com", 60)
    session = SimpleNamespace(streams=dict.fromkeys(range(held)), queued_bytes=0)
    visit = LinkVisit(ConnectVisit("192.0.2.9:1", "c1"))
    link = AgentLink(cast(Any, SimpleNamespace(session=session)), visit, Account("acme", "acme"), 20)
    registry.attach(link, "app", "http", 0)
    for _ in range(held):
        link.crowds.enter("192.0.2.1")
    board = make_board(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        siblings = make_siblings(Channel(ours, {}), board, registry)
        siblings.names["app"] = {1: ("acme", "http")}
        visitor = SimpleNamespace(crowd=crowd, is_proxy=is_proxy, hops=0)
        request = SimpleNamespace(refusal=None, head=object(), host="app.example.com", visitor=visitor)
        assert siblings.serves(cast(Any, request)) is elsewhere
    os.close(board)


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
