"""What a finished visit leaves behind for its span."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from observability.context import SpanContext
from tunnel.handler import Visit


class Origin(NamedTuple):
    """Where a span hangs. parent_id: "" for a root. is_remote: the parent is in another process.

    link: a visitor's context that was not joined but linked.
    """

    parent_id: str
    is_remote: bool
    link: SpanContext | None


ROOT = Origin("", False, None)

#: an Origin of a tuple that is one but for its type; the constructor is a function in Python
make_origin: Callable[[tuple[str, bool, SpanContext | None]], Origin] = partial(tuple.__new__, Origin)

Record = tuple[Visit, float, Origin, str]  #: visit, monotonic end, origin, name of the exception it ended with or ""

Enter = Callable[[Visit], Callable[[], None]]  #: makes a visit's span the current one; what it returns ends that
