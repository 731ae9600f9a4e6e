"""A nursery for two tasks of one exchange, which fails with one error and not with a group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

E = TypeVar("E", bound=BaseException)


@asynccontextmanager
async def open_pair() -> AsyncIterator[trio.Nursery]:
    """Like trio.open_nursery(); of several errors the first that is not Cancelled is raised, alone."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        found = leaves(group)
        raise next((leaf for leaf in found if not isinstance(leaf, trio.Cancelled)), found[0]) from None


def leaves(group: BaseExceptionGroup[E]) -> list[E]:
    """The exceptions in a group and in the groups in it."""
    found: list[E] = []
    for exc in group.exceptions:
        found += leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
