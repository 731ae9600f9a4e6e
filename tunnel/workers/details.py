"""Details of several workers as those of one program: the sections of /health/detailed.

Nobody here knows what a section says, so it goes by kind: what has keys is put together key by key, numbers add up,
what is so holds if it does for each, and of all else the first one's word is shown. The supervisor's own counts first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

Details = dict[str, Any]


def together(parts: Iterable[Details], alike: Collection[str] = ()) -> Details:
    """One of all parts. alike: sections that are of the same thing everywhere, and the first one's is shown."""
    found: Details = {}
    for part in parts:
        for name, section in part.items():
            if name not in found:
                found[name] = section
            elif name not in alike:
                found[name] = _both(found[name], section)
    return found


def counts(details: Details) -> Details:
    """What is left of a worker that has ended: the numbers on top of its sections, which it may have counted."""
    return {
        name: numbers
        for name, section in details.items()
        if isinstance(section, dict)
        and (numbers := {key: value for key, value in section.items() if _is_number(value)})
    }


def _both(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return together([one, other])
    if isinstance(one, bool) and isinstance(other, bool):
        return one and other
    return one + other if _is_number(one) and _is_number(other) else one


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
