"""A request whose body is not here yet: sent as it comes, while the answer may already be on its way."""

from __future__ import annotations

from time import monotonic

import trio
from msgspec import structs

from tunnel.agent.asking import Asking
from tunnel.agent.served import FOREVER, LocalRequest
from tunnel.errors import Failure
from tunnel.http.heads import check_trailers
from tunnel.link.tasks import open_pair
from tunnel.net import Socket
from tunnel.wire.frames import UNKNOWN


class Uploading(Asking):
    async def _streamed(self, local: LocalRequest, head: bytes) -> None:
        """Send the body as it comes while the answer may already be on its way."""
        service = local.visit.service
        # A fresh connection: a body that is gone can't be sent again if a kept one turns out to be dead.
        local.socket = socket = await service.connect()
        local.marks["connected"] = monotonic()
        complete = False

        async def upload() -> None:
            nonlocal complete
            try:
                await self._upload(local, socket)
                complete = True
            except trio.BrokenResourceError:
                pass  # the service stopped reading; what it has to say comes in the answer, or its absence

        async with open_pair() as nursery:
            try:
                await socket.send(head)
            except trio.BrokenResourceError as exc:
                raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc
            nursery.start_soon(upload)
            try:
                answer = await self._read_head(local, socket, await socket.recv_later())
            except trio.BrokenResourceError as exc:
                raise Failure("local_broken", f"{service.address} broke the connection off ({exc})") from exc
            if not complete:
                answer = structs.replace(answer, keep_alive=False)
            if not self._pass_small(local, answer):
                await self._relay(local, answer)
            nursery.cancel_scope.cancel()

    async def _upload(self, local: LocalRequest, socket: Socket) -> None:
        visit = local.visit
        stream = visit.stream
        chunked = visit.opened.length == UNKNOWN
        while True:
            visit.deadline = FOREVER  # the visitor is waited for, and the core watches that
            if not local.status:
                visit.waits_since = FOREVER
            part = await stream.receive()
            if not local.status:
                visit.waits_since = now = monotonic()
                visit.deadline = now + self._limit(visit.opened)
            if not part:
                break
            local.bytes_in += len(part)
            await socket.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            if stream.trailers and not check_trailers(stream.trailers):
                raise Failure("bad_request", "the request's trailer fields that came over the link are not valid")
            await socket.send(b"0\r\n" + stream.trailers + b"\r\n")
        elif 0 <= visit.opened.length != local.bytes_in:
            raise Failure("bad_request", "the request's body is not as long as it said")
