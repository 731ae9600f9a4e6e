"""Failures of requests become answers here, and nowhere else: a Failure names its outcome, and the table in
tunnel/errors.py says what everybody is told."""

from __future__ import annotations

import trio

from tunnel.core.answering import Answerer
from tunnel.core.limits import Counts
from tunnel.core.request import Request
from tunnel.core.timing import note_times
from tunnel.errors import OUTCOMES, Failure, row_of
from tunnel.http.answers import answer as make_answer

#: what is left of such a request is not known, or not wanted
_ENDS_CONNECTION = frozenset({"bad_request", "request_timeout", "head_too_large", "uri_too_long", "method_not_allowed"})


class Refuser:
    """refusals: counts of limits that were reached."""

    def __init__(self, answerer: Answerer, refusals: Counts) -> None:
        self._answerer = answerer
        self._refusals = refusals

    async def fail(self, request: Request, failure: Failure) -> None:
        """Answer with what the outcome says, or break off the answer that has begun."""
        row = OUTCOMES[failure.outcome]
        if row.name == "ok":
            row = OUTCOMES["link_lost"]  # the agent said "done" before it answered
        request.outcome, request.limit = row.name, failure.limit
        note_times(request, row.name)
        if failure.limit:
            self._refusals[failure.limit] += 1
        elif row.name == "timeout" and not (request.expired or request.head_written):  # by the agent's clock
            self._refusals["first_byte_time"] += 1
        if row.failed:
            request.error = failure.text or row_of(row.name, failure.limit).title
        else:
            request.cause = failure.text
        if request.head_written:
            # Too late for another answer: break this one off so that nobody takes it for complete.
            request.keep_alive = False
            if row.name == "visitor_aborted" and request.status != 101:
                request.status = row.status
            request.visitor.socket.abort()
            return
        request.status = failure.status or row.status
        if row.name == "visitor_aborted":
            request.keep_alive = False
            return
        self._skip_small_body(request)
        if not request.body_over or row.name in _ENDS_CONNECTION:
            request.keep_alive = False
        _, head, body = make_answer(
            row.name,
            request_id=request.request_id,
            accept=request.accept,
            method=request.method,
            host=request.host,
            detail=failure.text,
            retry_after=failure.retry_after,
            status=failure.status,
            http_version=request.http_version,
            close=not request.keep_alive,
            limit=failure.limit,
        )
        head = head[:-2] + self._answerer.timing(request) + b"\r\n"
        if request.http_version == "1.0":
            request.keep_alive = False
        try:
            await self._answerer.write_last(request, head + body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.keep_alive = False

    @staticmethod
    def _skip_small_body(request: Request) -> None:
        """A body that is here already need not cost the connection."""
        head, visitor = request.head, request.visitor
        if head is None or request.body_over or request.bytes_in:
            return
        length = head.length or 0
        if 0 < length <= len(visitor.buffer):
            visitor.buffer = visitor.buffer[length:]
            request.body_over = True

    def cut(self, request: Request) -> None:
        """The drain's deadline has come: answer at once if there is no answer yet, else break off."""
        request.keep_alive = False
        request.outcome = "draining"
        request.error = OUTCOMES["draining"].title
        note_times(request, "draining")
        if request.stream is not None:
            request.stream.reset("draining", "the core is shutting down")
        if request.method and not request.head_written:
            request.status = OUTCOMES["draining"].status
            _, head, body = make_answer(
                "draining", request_id=request.request_id, accept=request.accept, method=request.method, close=True
            )
            try:
                request.visitor.socket.send_nowait(head + body)
                request.visitor.socket.close()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        else:
            request.visitor.socket.abort()
