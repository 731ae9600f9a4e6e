"""How many files this process may have open (RLIMIT_NOFILE, getrlimit(2)): each connection is one.

There are two limits. The soft one counts, and is 1,024 in most shells and units, for the sake of programs that call
select(); the hard one is how far a program may raise it by itself, and we call epoll. What we start inherits it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tunnel.log import Logger

if sys.platform != "win32":
    import resource

#: what is tried, the most first: as many as Linux gives to any process (fs.nr_open), then what macOS may let us have,
#: whose own ceiling (kern.maxfilesperproc) is below a hard limit of "unlimited"
STEPS = (1_048_576, 262_144, 65_536, 24_576, 10_240)

ADVICE = "allow more before the start (ulimit -n, LimitNOFILE= of systemd, --ulimit nofile= of docker)"


def raise_limit() -> tuple[int, int]:
    """How many there might be, and how many there may be now; sys.maxsize for any number. Never lower than before."""
    if sys.platform == "win32":
        return sys.maxsize, sys.maxsize  # sockets are no files there
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _number(hard)
    for wanted in dict.fromkeys(min(step, most) for step in STEPS):
        if wanted <= _number(soft):
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            continue
        return soft, wanted
    return _number(soft), _number(soft)


def allowed_now() -> int:
    """sys.maxsize for any number."""
    return sys.maxsize if sys.platform == "win32" else _number(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def make_room(connections: int, ours: int, fitting: Callable[[int], str], log: Logger) -> None:
    """Raise the limit, and say so if it still does not reach for so many connections beside what is `ours`.

    fitting: what to do instead, for the number of connections that there is room for.
    """
    before, allowed = raise_limit()
    if allowed > before:
        log.debug("more files may be open", allowed=allowed, before=before)
    if allowed < connections + ours:
        log.warning(
            "fewer files may be open than the limits allow connections",
            allowed=allowed,
            needed=connections + ours,
            advice=f"{ADVICE}, or {fitting(max(allowed - ours, 0))}",
        )
