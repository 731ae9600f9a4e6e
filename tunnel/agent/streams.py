"""Streams that the core opens on a link: taken on at once where that is possible, else by a worker of the link."""

from __future__ import annotations

from collections.abc import Sequence

from tunnel.agent.attempt import Attempt
from tunnel.agent.forward import Forwarder
from tunnel.agent.places import Places
from tunnel.agent.quick import Quick, UnderWay
from tunnel.agent.served import ServedStream
from tunnel.errors import WireError
from tunnel.http.client import Service
from tunnel.link.stream import Stream
from tunnel.link.workers import Cancellable, Workers
from tunnel.ready import Ready
from tunnel.wire.held import Held


class Streams:
    """Of all links of an agent. services: in the order of its tunnels."""

    def __init__(
        self,
        forwarder: Forwarder,
        services: Sequence[Service],
        agent_id: str,
        held: Held,
        places: Places,
        ready: Ready | None,
    ) -> None:
        self._forwarder = forwarder
        self._services = services
        self._agent_id = agent_id
        self._held = held
        self._places = places
        self._ready = ready
        self._under_way: UnderWay = {}

    def begin(self, attempt: Attempt, stream: Stream) -> None:
        """A visitor's stream: a worker of the link's own nursery serves it."""
        if stream.link.nursery is None or not stream.link.is_welcomed:
            raise WireError("the core opened a stream before its welcome")
        if len(stream.link.session.streams) > self._places.each and self._places.is_beyond(attempt):
            stream.reset("overloaded", "the agent has more open requests than it said it would take")
            return
        if self._held.is_full:
            stream.reset("overloaded", "the agent holds as many unread and unsent bytes as it may (-max-buffer)")
            return
        if attempt.workers is None:
            attempt.workers = Workers(stream.link.nursery, self._serve)
            observers = self._forwarder.observers
            if observers is not None and self._ready is not None:
                attempt.quick = Quick(self._forwarder, observers, self._ready, attempt.workers.submit, self._under_way)
                stream.link.nursery.start_soon(attempt.quick.run)
        if attempt.quick is None or not attempt.quick.begin(stream, self._services, self._agent_id):
            attempt.workers.submit(stream)

    async def _serve(self, job: Stream | ServedStream, scope: Cancellable) -> None:
        """job: a stream, or one that was begun without a task."""
        if isinstance(job, ServedStream):
            await self._forwarder.go_on(job, scope)
        else:
            await self._forwarder.serve(job.link, job, self._services, self._agent_id, scope)
