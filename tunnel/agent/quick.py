"""The most common streams, served where their bytes arrive: no task is woken for them.

A request that is all in its OPEN frame, for a service with a kept connection, whose answer comes in one small piece,
needs nothing waited for but that answer. The link's reader begins it, `tunnel.ready` tells of the answer, and what is
done then are the same functions that a task calls (forward.py, local.py).

Whatever else turns up (no whole answer, a connection that was dead all along, a reset from the core, the deadline) is
left to a task, which goes on from where the stream has got to: `Forwarder.go_on`. So only tasks wait, fail and retry;
nothing of that is in here.

Not where a layer is a coroutine around each stream, and not without epoll: there a task does it all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from tunnel.agent.asking import is_whole
from tunnel.agent.forward import Forwarder, leave, make_local
from tunnel.agent.served import ServedStream
from tunnel.errors import Failure
from tunnel.http.client import Service
from tunnel.http.forwarded import read_forwarded
from tunnel.link.stream import Stream
from tunnel.net import Socket
from tunnel.observers import Observers
from tunnel.ready import Ready
from tunnel.wire import frames
from tunnel.wire.frames import Open

HandOver = Callable[[ServedStream], None]


#: streams by the connection to a service on which they wait, of all links: kept connections go from one to another
UnderWay = dict[Socket, "tuple[Quick, ServedStream]"]


class Quick:
    """The streams of one link. hand_over: gives one to a task of the link's nursery, which calls `Forwarder.go_on`.
    under_way: shared by all links of an agent.

    `run` has to run in that nursery: it ends those that are under way with the link.
    """

    def __init__(
        self, forwarder: Forwarder, observers: Observers, ready: Ready, hand_over: HandOver, under_way: UnderWay
    ) -> None:
        self._forwarder = forwarder
        self._observers = observers
        self._ready = ready
        self._hand_over = hand_over
        self._under_way = under_way
        self._is_on = True

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            self._is_on = False
            for quick, visit in list(self._under_way.values()):
                if quick is self:
                    self._cut(visit, exc)
            raise

    def begin(self, stream: Stream, services: Sequence[Service], agent_id: str) -> bool:
        """Serve a stream; False if it is none of ours."""
        opened = stream.head
        assert isinstance(opened, Open)
        if (
            not self._is_on
            or opened.protocol != frames.HTTP
            or not is_whole(stream, opened)
            or stream.failure is not None
            or opened.tunnel >= len(services)
        ):
            return False
        service = services[opened.tunnel]
        try:
            head = read_forwarded(opened.head)
        except Failure:
            return False  # a task says so
        socket = service.take_idle()
        if socket is None:
            return False
        if socket.on_close is None and not self._ready.add(socket, partial(_on_ready, self._under_way, socket)):
            service.keep(socket)
            return False
        scope = _Scope(self)
        scope.visit = visit = self._forwarder.begin(stream, opened, service, agent_id, scope)
        self._observers.begin(visit)
        local = visit.local = make_local(visit, head)
        self._observers.begin(local)
        self._under_way[socket] = self, visit
        try:
            is_sent = self._forwarder.local.begin(local, socket)
        except Failure as exc:
            local.problem, is_sent = exc, False
        if not is_sent:
            self.give_up(visit)
        return True

    def go_on(self, socket: Socket, visit: ServedStream) -> None:
        """Something has come on the connection on which the stream waits."""
        local, observers = visit.local, self._observers
        assert local is not None
        is_done = self._forwarder.local.finish(local)
        if is_done is None:
            return
        if not is_done:
            self.give_up(visit)
            return
        del self._under_way[socket]
        observers.end(local, None)
        leave(local)
        self._forwarder.succeeded(visit)
        observers.end(visit, None)
        self._forwarder.end(visit)

    def give_up(self, visit: ServedStream) -> None:
        """Leave it to a task."""
        if self._forget(visit):
            self._hand_over(visit)

    def _forget(self, visit: ServedStream) -> bool:
        """Whether it was ours until now."""
        local = visit.local
        if local is None or local.socket is None or self._under_way.get(local.socket) != (self, visit):
            return False
        del self._under_way[local.socket]
        return True

    def _cut(self, visit: ServedStream, raised: BaseException) -> None:
        """The link has ended."""
        local = visit.local
        assert local is not None
        self._forget(visit)
        if local.socket is not None:
            local.socket.close()
        self._forwarder.local.name_cancellation(local)
        self._observers.end(local, raised)
        leave(local)
        self._forwarder.name_cancellation(visit)
        self._observers.end(visit, raised)
        self._forwarder.end(visit)


def _on_ready(under_way: UnderWay, socket: Socket, has_ended: bool) -> None:
    found = under_way.get(socket)
    if found is not None and not socket.is_closed:  # else it is kept for the next one, or a task's
        quick, visit = found
        quick.go_on(socket, visit)


class _Scope:
    """In place of a task's: who cancels it gets a task that is cancelled."""

    __slots__ = ("_quick", "visit")

    def __init__(self, quick: Quick) -> None:
        self._quick = quick
        self.visit: ServedStream | None = None

    def cancel(self) -> None:
        if self.visit is not None:
            self._quick.give_up(self.visit)
