"""What became of the requests: how many ended how, and the last that failed or were turned away, for the status page.

Those that failed and those that were turned away are kept apart, so that a flood of the one kind (a scanner that asks
for names which nobody has) does not push out the other. What is kept was chosen by visitors and services: it is cut,
and has no query, no credentials and no characters that do anything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import chain
from time import time

import msgspec

from tunnel.errors import Failure, row_of
from tunnel.handler import RequestVisit, StreamVisit, Visit, monotonic, path_of
from tunnel.log import CONTROL, redact

KEPT = 50  #: of each kind
MAX_TEXT = 300  #: characters of a path or error that are kept
MAX_NAME = 255  #: of a host or id
MAX_READ = 4096  #: of which that is made


class FailedRequest(msgspec.Struct):
    """A request that failed, or was turned away (`failed` is False then); a connection to a TCP tunnel, too.

    at: its end, seconds since 1970. side: whose it is on, as in tunnel/errors.py. error: why, one line. trace_id: "" if
    the trace is not exported.
    """

    at: float
    request_id: str
    method: str
    host: str
    path: str
    status: int
    outcome: str
    side: str
    failed: bool
    error: str
    milliseconds: float
    tunnel: str = ""
    agent_id: str = ""
    connection_id: str = ""
    account_id: str = ""
    trace_id: str = ""
    worker: int = 0  # that had it
    limit: str = ""  # of tunnel/errors.py, that was reached


class Recent(msgspec.Struct):
    """outcomes: how many requests ended with each, since the start. failed: how many of all. failures: oldest first."""

    outcomes: dict[str, int] = {}
    failed: int = 0
    failures: list[FailedRequest] = []


class RecentRequests:
    """Whoever ends a request counts it as `answered`, or has it noted if there is something to tell of it."""

    def __init__(self) -> None:
        self.answered = 0
        self._outcomes: Counter[str] = Counter()
        self._failed_count = 0
        self._failed: deque[FailedRequest] = deque(maxlen=KEPT)
        self._refused: deque[FailedRequest] = deque(maxlen=KEPT)

    def note(self, visit: RequestVisit) -> None:
        """A request has ended in another way than well."""
        if not visit.outcome:
            return  # another process has it now
        self._outcomes[visit.outcome] += 1
        if visit.outcome == "visitor_aborted" and (visit.event_stream or not visit.method):
            return  # that is how event streams end, and connections on which nothing was asked
        failure = _describe(visit)
        self._failed_count += failure.failed
        self._keep(failure)

    def note_tcp(self, tunnel: str, port: int, failure: Failure, visit: StreamVisit | None) -> None:
        """So has a connection to a TCP tunnel, whose visitor can't be told why. It counts as no request."""
        row = row_of(failure.outcome, failure.limit)
        error = harmless(str(failure), MAX_TEXT)
        noted = FailedRequest(
            time(), "", "TCP", "", f"port {port}", 0, row.name, row.side, row.failed, error, 0.0, tunnel,
            limit=failure.limit,
        )  # fmt: skip
        if visit is not None:  # it had got as far as an agent
            noted.milliseconds = _milliseconds(visit)
            noted.agent_id = harmless(visit.agent_id, MAX_NAME)
            noted.connection_id, noted.account_id = visit.connection_id, visit.account_id
            noted.trace_id = visit.trace_id if visit.sampled else ""
        self._keep(noted)

    def _keep(self, failure: FailedRequest) -> None:
        (self._failed if failure.failed else self._refused).append(failure)

    def add(self, recent: Recent) -> None:
        """What another process counted and kept, which has ended."""
        self._outcomes.update(recent.outcomes)
        self._failed_count += recent.failed
        for failure in recent.failures:
            self._keep(failure)

    def say(self) -> Recent:
        outcomes = {**self._outcomes, "ok": self._outcomes["ok"] + self.answered}
        return Recent(outcomes, self._failed_count, _in_order(chain(self._failed, self._refused)))


def together(parts: Iterable[Recent]) -> Recent:
    """Of several processes as one: the last of each kind."""
    outcomes: Counter[str] = Counter()
    whole = Recent()
    for part in parts:
        outcomes.update(part.outcomes)
        whole.failed += part.failed
        whole.failures = [*whole.failures, *part.failures]
    failures = _in_order(whole.failures)
    kinds = ([one for one in failures if one.failed is failed][-KEPT:] for failed in (True, False))
    whole.outcomes, whole.failures = dict(outcomes), _in_order(chain(*kinds))
    return whole


def _in_order(failures: Iterable[FailedRequest]) -> list[FailedRequest]:
    return sorted(failures, key=lambda one: one.at)


def _describe(visit: RequestVisit) -> FailedRequest:
    row = row_of(visit.outcome, visit.limit)
    # A service's own 5xx is passed on as it is ("ok"), and has failed all the same.
    is_the_services = row.name == "ok"
    return FailedRequest(
        time(),
        harmless(visit.request_id, MAX_NAME),
        harmless(visit.method, MAX_NAME),
        harmless(visit.host, MAX_NAME),
        harmless(path_of(visit.target), MAX_TEXT),
        visit.status,
        row.name,
        "local service" if is_the_services else row.side,
        row.failed or is_the_services,
        harmless(visit.error or visit.cause or row.title, MAX_TEXT),
        _milliseconds(visit),
        visit.tunnel,
        harmless(visit.agent_id, MAX_NAME),
        visit.connection_id,
        visit.account_id,
        visit.trace_id if visit.sampled else "",
        limit=visit.limit,
    )


def _milliseconds(visit: Visit) -> float:
    return round(((visit.ended or monotonic()) - visit.started) * 1000, 2)


def harmless(text: str, most: int) -> str:
    """The text without secrets and control characters, and not longer than this."""
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", redact(text[:MAX_READ]))
    return text if len(text) <= most else text[: most - 1] + "…"
