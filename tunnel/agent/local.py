"""A request of a stream and its answer, with the local service: asked over a kept connection or a new one.

The common exchange is a whole request, a kept connection, and a small answer that comes in one piece: `begin`, and
when it is here `finish`, which wait for nothing. tunnel/agent/quick.py calls them without a task; then one may go on
with what they have left. Everything else (bodies that are still coming, long answers, upgrades, interim answers) goes
the long way beside them.

An exchanger is one thing in four rooms, each of which goes on from the one before: the answer passed on (answering.py),
the service asked and the answer's head read (asking.py), bodies that are still coming (uploading.py), and here which of
these it takes. They are classes that extend one another and no parts that call one another, for each request would pay
for that.
"""

from __future__ import annotations

import trio

from tunnel.agent.asking import explain_tls, is_whole
from tunnel.agent.served import LocalRequest
from tunnel.agent.uploading import Uploading
from tunnel.errors import BY_CODE, OUTCOMES, Failure
from tunnel.http.forwarded import local_head
from tunnel.log import get_logger
from tunnel.net import Socket
from tunnel.wire import frames

log = get_logger("tunnel.agent")


class LocalExchanger(Uploading):
    """request_timeout: seconds to the head of an answer."""

    async def exchange(self, local: LocalRequest) -> None:
        """The innermost handler of a local request. Raises Failure."""
        visit = local.visit
        visit.deadline = visit.started + self._limit(visit.opened)
        try:
            try:
                await self._any(local)
            except Failure as exc:
                if exc.outcome != "local_broken" or local.status or not await visit.service.is_tls_unawares():
                    raise
                raise Failure("local_broken", explain_tls(visit.service)) from exc
            local.outcome = "ok"
            if local.status == 400 and await visit.service.is_tls_unawares():
                # nginx and Go answer plain HTTP on their port for TLS, and visitors have read what they say.
                log.warning("local service answers 400", local=local.address, reason=explain_tls(visit.service))
        except Failure as exc:
            local.outcome = exc.outcome
            local.error = exc.text if OUTCOMES[exc.outcome].failed else ""  # a visitor who leaves is no fault of it
            raise
        except trio.Cancelled:
            self.name_cancellation(local)
            raise
        finally:
            if local.socket is not None:
                local.socket.close()

    async def _any(self, local: LocalRequest) -> None:
        """An exchange of any kind. Raises Failure."""
        stream, opened = local.visit.stream, local.visit.opened
        # Before an upgrade there is no body; what comes on the stream then is for `_upgraded` alone.
        if opened.protocol == frames.UPGRADE:
            await self._relay(local, await self._ask(local, local_head(local.head, local.headers, opened.length)))
        elif local.request or is_whole(stream, opened):
            answer = await self._ask(local, local.request or self.compose(local))
            if not self._pass_small(local, answer):
                await self._relay(local, answer)
        else:
            await self._streamed(local, local_head(local.head, local.headers, opened.length))

    def name_cancellation(self, local: LocalRequest) -> None:
        """Say whose doing it is that nobody waits for the service any longer."""
        if local.visit.timed_out:
            local.outcome, local.error = "timeout", self.explain_timeout(local.visit)
        else:
            failure = local.visit.stream.failure
            local.outcome = BY_CODE[failure[0]].name if failure and failure[0] in BY_CODE else "link_lost"

    # Without waiting ------------------------------------------------------------------------------------------

    def begin(self, local: LocalRequest, socket: Socket) -> bool:
        """Send a whole request on a kept connection; False if a task has to go on with that. Raises Failure."""
        visit = local.visit
        visit.deadline = visit.started + self._limit(visit.opened)
        local.socket = socket
        request = local.request = self.compose(local)
        try:
            local.sent = socket.send_nowait(request)
        except trio.BrokenResourceError:
            return False
        return local.sent == len(request)

    def finish(self, local: LocalRequest) -> bool | None:
        """Pass on what has come, if that is the whole of a small answer; None: nothing has come yet. False if a task
        has to go on with it."""
        socket = local.socket
        assert socket is not None
        try:
            local.part = part = socket.recv_here()
            if part is None:
                return None
            answer = self._whole_head(local, part)
        except (Failure, trio.BrokenResourceError) as exc:
            local.problem = exc
            return False
        if answer is None or not self._pass_small(local, answer):
            return False
        local.outcome = "ok"
        if local.socket is not None:
            local.socket.close()
        return True
