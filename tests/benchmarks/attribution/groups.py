"""Which part of the work a sample belongs to: the innermost frame that the table knows decides, so what a library does
for us counts for whoever called it, and the scheduler's own frames count for the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PARSE, EMIT, LINK, SCHEDULER, SOCKETS = "parse", "emit", "link", "scheduler", "sockets"
OBSERVABILITY, HANDLING, COLLECTOR, OTHER = "observability", "handling", "garbage collector", "other"
GROUPS = (PARSE, EMIT, LINK, HANDLING, SCHEDULER, SOCKETS, OBSERVABILITY, COLLECTOR, OTHER)

#: The longest that fits decides: a package, a module, or a module and the beginning of a function's name.
#: handling: what is left of an exchange (finding the tunnel, quotas, the exchange's own steps).
TABLE = {
    "tunnel.http": PARSE,
    "tunnel.http.answers": EMIT,
    "tunnel.http.pages": EMIT,
    "tunnel.http.client": HANDLING,
    "tunnel.http.forwarded:local_head": EMIT,
    "tunnel.workers": HANDLING,
    "tunnel.core": HANDLING,
    "tunnel.core.reading": PARSE,
    "tunnel.core.answering": EMIT,
    "tunnel.agent": HANDLING,
    "tunnel.handler": HANDLING,
    "tunnel.wire": LINK,
    "tunnel.link": LINK,
    "tunnel.link.sweeper": SCHEDULER,
    "tunnel.link.tasks": SCHEDULER,
    "tunnel.link.workers": SCHEDULER,
    "trio_websocket": LINK,
    "wsproto": LINK,
    "tunnel.net": SOCKETS,
    "socket": SOCKETS,
    "ssl": SOCKETS,
    "trio": SCHEDULER,
    "trio._socket": SOCKETS,
    "trio._highlevel": SOCKETS,
    "trio._ssl": SOCKETS,
    "outcome": SCHEDULER,
    "tunnel.observers": OBSERVABILITY,
    "tunnel.plugins": OBSERVABILITY,
    "tunnel.log": OBSERVABILITY,
    "observability": OBSERVABILITY,
    # A signal that comes within a collection is handled in the first Python code after it, which is this call-back.
    "observability.runtime:PauseMeter._callback": COLLECTOR,
}


class Stack(NamedTuple):
    """frames: "module:function", innermost first; line: of the innermost"""

    samples: int
    line: int
    frames: Sequence[str]


def rule_for(frame: str) -> str | None:
    """The group of one frame, if the table knows it."""
    best = max((key for key in TABLE if _covers(key, frame)), key=len, default=None)
    return None if best is None else TABLE[best]


def _covers(key: str, frame: str) -> bool:
    if ":" in key:
        return frame.startswith(key)
    return frame.startswith(key) and frame[len(key) : len(key) + 1] in (".", ":", "_")


def group_of(frames: Iterable[str]) -> str:
    """The group of a stack, innermost frame first."""
    return next((group for frame in frames if (group := rule_for(frame)) is not None), OTHER)


def owner_of(frames: Sequence[str]) -> str:
    """The innermost frame that the table knows: whom to look at."""
    return next((frame for frame in frames if rule_for(frame) is not None), frames[0] if frames else "?")


def shares(stacks: Iterable[Stack]) -> dict[str, float]:
    """Part of all samples, by group; all groups are there."""
    counts = dict.fromkeys(GROUPS, 0)
    for stack in stacks:
        counts[group_of(stack.frames)] += stack.samples
    total = sum(counts.values()) or 1
    return {group: count / total for group, count in counts.items()}


def owners(stacks: Iterable[Stack]) -> list[tuple[str, str, float]]:
    """(function, its group, part of all samples), dearest first."""
    counts: dict[str, int] = {}
    groups: dict[str, str] = {}
    for stack in stacks:
        name = owner_of(stack.frames)
        counts[name] = counts.get(name, 0) + stack.samples
        groups[name] = group_of(stack.frames)
    total = sum(counts.values()) or 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return [(name, groups[name], count / total) for name, count in ranked]
