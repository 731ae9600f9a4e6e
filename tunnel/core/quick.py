"""The most common requests, served where their bytes arrive: no task is woken for them.

A request that is all here, and whose answer is small, needs nothing waited for but its arrival and its answer's.
`tunnel.ready` tells of the one, the stream of the other, and what is done then are the same functions that the
connection's task calls (exchange.py, reading.py, answering.py). That saves two wake-ups and a dozen coroutines.

Meanwhile the task waits in `wait`. It is woken as soon as there is anything else to do, and goes on from where the
request has got to: not all here, refused (`Request.refusal`), with its head read, with observers told (`is_begun`) and
perhaps its stream opened (`opened`), with its answer here. So only the task waits, fails, refuses, retries and closes;
nothing of that is in here.

Not where a layer is a coroutine around each request, and not without epoll: there the task does it all.
"""

from __future__ import annotations

from functools import partial

import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

from tunnel.core.exchange import Exchanger
from tunnel.core.request import Request, RequestStream
from tunnel.core.visitor import HEAD, IDLE, Visitor
from tunnel.log import get_logger
from tunnel.observers import Observers
from tunnel.ready import Ready

log = get_logger("tunnel.core")


class Quick:
    """keepalive_timeout: seconds between requests."""

    def __init__(self, exchanger: Exchanger, observers: Observers, ready: Ready, keepalive_timeout: float) -> None:
        self._exchanger = exchanger
        self._observers = observers
        self._ready = ready
        self._keepalive_timeout = keepalive_timeout

    def join(self, visitor: Visitor) -> bool:
        """Whether this connection's requests may be served here from now on."""
        visitor.is_ready = not visitor.socket.is_plain  # the handshake may have brought the first
        return self._ready.add(visitor.socket, partial(self._on_ready, visitor))

    async def wait(self, visitor: Visitor) -> bool:
        """The connection's task, between two requests: serve them until it is needed. False: the connection ends.

        Needed for `visitor.request`, which is under way; for `visitor.buffer`, if that is not empty; else for what the
        socket says.
        """
        if visitor.is_ready and self._read(visitor, visitor.has_ended):
            return True
        visitor.task = current_task()

        def abort(_: object) -> Abort:
            visitor.task = None
            return Abort.SUCCEEDED

        try:
            await wait_task_rescheduled(abort)
        except trio.Cancelled as exc:
            if visitor.request is not None:
                self._cut(visitor.request, exc)
            raise
        return not visitor.is_over

    def _wake(self, visitor: Visitor) -> None:
        task = visitor.task
        if task is not None:
            visitor.task = None
            reschedule(task)

    # A request comes --------------------------------------------------------------------------------------------

    def _on_ready(self, visitor: Visitor, has_ended: bool) -> None:
        visitor.has_ended |= has_ended  # that is told once, maybe while an answer comes first
        if visitor.socket.is_closed:
            self._wake(visitor)
        elif visitor.task is None or visitor.request is not None:
            visitor.is_ready = True  # the task or the answer comes first
        elif self._read(visitor, has_ended):
            self._wake(visitor)

    def _read(self, visitor: Visitor, is_more: bool = False) -> bool:
        """Take what has come, and serve it; says whether the task is needed. is_more: there is something behind it."""
        visitor.is_ready = is_more
        try:
            data = visitor.socket.recv_here()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return True  # it will see that for itself
        if data is None:
            return False
        if visitor.socket.has_rest:
            visitor.is_ready = True
        visitor.buffer = data
        return not (data and self._begin(visitor))

    def _begin(self, visitor: Visitor) -> bool:
        """Send a request on its way; False if it is none of ours."""
        exchanger, observers = self._exchanger, self._observers
        request = exchanger.begin(visitor)
        visitor.phase = HEAD
        try:
            if not exchanger.heads.read_nowait(request) or exchanger.serves_elsewhere(request):
                return False
        except Exception as exc:
            request.refusal = exc
            return False
        observers.begin(request)
        request.is_begun = True
        try:
            visit = exchanger.route(request)
        except Exception as exc:
            request.refusal = exc
            return False
        if visit is None:
            return False
        observers.begin(visit)
        request.opened = visit
        if not visit.complete or visit.protocol != "http":
            return False
        try:
            exchanger.open(visit)
        except Exception as exc:
            visit.refusal = exc
            return False
        assert request.stream is not None
        request.stream.on_change = partial(self._on_answer, visit)
        return True

    # Its answer comes -------------------------------------------------------------------------------------------

    def _on_answer(self, visit: RequestStream) -> None:
        """The stream has changed: pass the answer on, or leave it to the task."""
        request = visit.request
        stream, visitor = request.stream, request.visitor
        assert stream is not None
        if stream.head is None and stream.failure is None and not stream.interims:
            return
        stream.on_change = None
        try:
            if self._exchanger.answerer.answer_nowait(visit):
                self._finish(visit)
                return
        except Exception as exc:
            visit.refusal = exc
        self._wake(visitor)

    def _finish(self, visit: RequestStream) -> None:
        exchanger, observers, request = self._exchanger, self._observers, visit.request
        visitor = request.visitor
        visit.outcome = "ok"
        exchanger.leave(visit)
        observers.end(visit, None)
        exchanger.succeeded(request)
        observers.end(request, None)
        exchanger.end(request)
        if not request.keep_alive:
            visitor.is_over = True
            self._wake(visitor)
            return
        visitor.rest()
        if visitor.guest is not None:
            exchanger.forwarding.leave(visitor)
        if visitor.buffer:  # pipelined: others come first
            self._wake(visitor)
            return
        visitor.begin(IDLE, self._keepalive_timeout)
        if visitor.is_ready and self._read(visitor, visitor.has_ended):
            self._wake(visitor)

    def _cut(self, request: Request, raised: BaseException) -> None:
        """The task was cancelled while its request was under way: the drain's deadline has come."""
        exchanger, observers, visit = self._exchanger, self._observers, request.opened
        if request.stream is not None:
            request.stream.on_change = None
        exchanger.refuser.cut(request)
        if visit is not None:
            visit.outcome = "draining"
            exchanger.leave(visit)
            observers.end(visit, raised)
        if request.is_begun:
            observers.end(request, raised)
        exchanger.end(request)
