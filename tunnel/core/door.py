"""The public side: visitors' connections, one task each, request after request."""

from __future__ import annotations

import socket as stdlib_socket
import ssl
from collections import Counter
from itertools import islice
from time import monotonic
from typing import Any, Protocol

import trio

from tunnel.core.certificates import Certificates
from tunnel.core.crowds import crowd_of
from tunnel.core.forwarding import Forwarding
from tunnel.core.limits import Counts, Place, Rate, Shares
from tunnel.core.proxied import ProxyHeaderError, ProxyHeaders, read_header
from tunnel.core.quick import Quick
from tunnel.core.request import make_request_id
from tunnel.core.visitor import ANSWER, BODY, HEAD, IDLE, Visitor
from tunnel.errors import TunnelError
from tunnel.http.answers import answer as make_answer
from tunnel.link.sweeper import Sweeper
from tunnel.listening import accept_each
from tunnel.log import get_logger
from tunnel.net import Socket, address_text, with_tls

log = get_logger("tunnel.core")

CROWD = 10  #: connections that an address must have more than another one to make room for it
LOOKED_AT = 200  #: connections, to find one that gives way to another
MAX_REFUSED = 100  #: connections beyond a limit that are told so at a time; others are closed
REASONS = {
    "connections": "too many connections are open",
    "connections_per_address": "too many connections are open from this address",
}
TOLD_EVERY = 60.0  #: seconds between two lines of the log about the same limit
LINGER = 1.0  #: seconds to let a visitor read an answer that came before its body was read


class TooMany(TunnelError):
    """A connection that is one too many for its address. limit: a word of LIMITS."""

    def __init__(self, limit: str, address: str) -> None:
        super().__init__(REASONS.get(limit, limit))
        self.limit = limit
        self.address = address


class Serving(Protocol):
    """What a door needs of who serves its connections: the Exchanger, or the plain side."""

    @property
    def refusals(self) -> Counts: ...

    @property
    def forwarding(self) -> Forwarding: ...

    async def serve(self, visitor: Visitor) -> bool: ...


class Door:
    """serving: who answers the requests. tls: for visitors, None for plain HTTP. proxies: who sends PROXY protocol
    headers. handshake_timeout: seconds for these and TLS; keepalive_timeout: seconds between requests. shares: all
    visitors' connections, other doors' and TCP ports' too. quick: serves what it can without the connection's task."""

    def __init__(
        self,
        serving: Serving,
        sweeper: Sweeper,
        *,
        tls: Certificates | None,
        proxies: ProxyHeaders,
        handshake_timeout: float,
        keepalive_timeout: float,
        shares: Shares | None = None,
        rate: Rate | None = None,
        quick: Quick | None = None,
    ) -> None:
        self.visitors: set[Visitor] = set()
        self._serving = serving
        self._sweeper = sweeper
        self._tls = tls
        self._proxies = proxies
        self._handshake_timeout = handshake_timeout
        self._keepalive_timeout = keepalive_timeout
        self._refusals = serving.refusals
        self._shares = shares or Shares(0, 0)
        self._rate = rate or Rate(0)
        self._quick = quick
        self._refused = 0  # connections that are being told so
        self._told: dict[str, float] = {}  # when the log had a line about this limit
        self._untold: Counter[str] = Counter()  # refusals since

    async def accept(self, listener: stdlib_socket.socket, nursery: trio.Nursery) -> None:
        """Take visitors from a listener until cancelled; their connections are tasks of `nursery`."""
        await accept_each(listener, self._serve, nursery, _report, self._shares.turn)

    def close_idle(self, keep: float = 0.0) -> bool:
        """Close connections that have waited for another request for `keep` seconds; says whether others still wait."""
        waiting = False
        began = monotonic() - keep
        for visitor in list(self.visitors):
            if visitor.phase == IDLE:
                if keep and visitor.deadline - self._keepalive_timeout > began:
                    waiting = True
                else:
                    visitor.socket.close()
        return waiting

    def cut_off(self) -> None:
        """The drain's deadline: requests that wait for their service are answered, before their links end."""
        for visitor in list(self.visitors):
            request = visitor.request
            if request is not None and request.stream is not None:
                request.stream.reset("draining", "the server is shutting down and could wait no longer")

    async def _serve(self, socket: Socket, address: Any) -> None:
        host = address[0].removeprefix("::ffff:")
        place = Place(self._shares)
        try:
            self._enter(place, host)
            await self._welcome(socket, host, address, place)
        except TooMany as exc:
            place.leave()
            self._note_refusal(exc)
            await self._turn_away(socket, exc.limit)
        except Exception as exc:  # a bug costs this one connection
            log.error("connection broke", error=exc)
            socket.close()
        finally:
            place.leave()

    def _enter(self, place: Place, host: str) -> None:
        """Raises TooMany. A proxy comes for many: it has no limits of its own, those whom it announces have."""
        is_proxy = self._serving.forwarding.is_trusted(host) or self._proxies.expects(host)
        limit = place.take(host, is_proxy)
        if limit == "connections" and self._make_room(host):
            place.add(host)
            limit = ""
        if not limit and self._tls is not None and not is_proxy and not self._rate.take(host):
            limit = "handshakes"
        if limit:
            raise TooMany(limit, host)

    def _make_room(self, host: str) -> bool:
        """Where all places are taken: close a connection that waits for a request, of an address with many more of them
        than this one, so that a few addresses which take them all keep nobody out."""
        most, crowded = self._shares.count(host) + CROWD, None
        for visitor in islice(self.visitors, LOOKED_AT):
            if visitor.phase in (IDLE, HEAD) and not visitor.socket.is_closed:
                count = self._shares.count(visitor.address)
                if count > most:
                    most, crowded = count, visitor
        if crowded is None:
            return False
        self._refusals["connections"] += 1
        crowded.socket.close()
        return True

    def _note_refusal(self, refusal: TooMany) -> None:
        """No request of theirs was read, so there is no record of it; a crowd must not fill the log either."""
        limit, now = refusal.limit, monotonic()
        self._untold[limit] += 1
        if now - self._told.get(limit, -TOLD_EVERY) >= TOLD_EVERY:
            self._told[limit] = now
            log.warning(
                "visitors turned away", limit=limit, remote=refusal.address, connections=self._untold.pop(limit)
            )

    async def _turn_away(self, socket: Socket, limit: str) -> None:
        """Say why, if that costs little: not under TLS, and not to many at a time."""
        self._refusals[limit] += 1
        if self._tls is not None or self._refused >= MAX_REFUSED:
            socket.close()
            return
        self._refused += 1
        _, head, body = make_answer(
            "overloaded", request_id=make_request_id(), detail=REASONS[limit], close=True, limit=limit
        )
        try:
            socket.send_nowait(head + body)
            socket.shutdown()
            with trio.move_on_after(LINGER):
                while await socket.recv():
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._refused -= 1
            socket.close()

    async def _welcome(self, socket: Socket, host: str, address: Any, place: Place) -> None:
        proto = "http"
        if self._tls is not None or self._proxies.expects(host):
            with trio.move_on_after(self._handshake_timeout) as scope:
                try:
                    socket, host, proto = await self._begin(socket, host, place)
                except ProxyHeaderError as exc:
                    log.warning("connection from a proxy refused", remote=address_text(address), reason=str(exc))
                    socket.close()
                    return
                except (ssl.SSLError, trio.BrokenResourceError):
                    socket.close()
                    return
            if scope.cancelled_caught:
                socket.close()
                return
        await self._converse(Visitor(socket, host, proto, self._refusals))

    async def adopt(self, socket: Socket, host: str, proto: str, data: bytes, hops: int) -> None:
        """Serve a visitor whose connection another process of this core has taken, and from whom it has read `data`."""
        visitor = Visitor(socket, host, proto, self._refusals)
        visitor.buffer, visitor.hops = data, hops
        if socket.sock.family == getattr(stdlib_socket, "AF_UNIX", None):  # only its bytes come here: it counts there
            await self._converse(visitor)
            return
        self._shares.add(host)
        try:
            await self._converse(visitor)
        finally:
            self._shares.leave(host)

    async def _converse(self, visitor: Visitor) -> None:
        """Request after request, until the connection ends."""
        visitor.is_proxy = self._serving.forwarding.is_trusted(visitor.address)
        if not (visitor.is_proxy or self._proxies.expects(visitor.address)):
            visitor.crowd = crowd_of(visitor.address)
        self.visitors.add(visitor)
        self._sweeper.add(visitor)
        try:
            await self._requests(visitor)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception as exc:  # a bug costs this one connection
            log.error("connection broke", error=exc)
        finally:
            self._serving.forwarding.leave(visitor)
            self._sweeper.discard(visitor)
            self.visitors.discard(visitor)
            visitor.socket.close()

    async def _begin(self, socket: Socket, host: str, place: Place) -> tuple[Socket, str, str]:
        """What comes before the first request: a proxy's header, TLS. Returns connection, visitor's address, scheme.

        Raises TooMany when the address that a proxy announces has enough.
        """
        proto = "http"
        if self._proxies.expects(host):
            behind = await read_header(socket)
            if behind.address:
                host = behind.address
                self._enter(place, host)
            proto = "https" if behind.secure else "http"
        if self._tls is None:
            return socket, host, proto
        secured = with_tls(socket, self._tls.context, server_side=True)
        try:
            await secured.handshake()
        except BaseException:
            secured.close()
            raise
        return secured, host, "https"

    async def _requests(self, visitor: Visitor) -> None:
        serving = self._serving
        receive = visitor.socket.recv
        quick = self._quick if self._quick is not None and self._quick.join(visitor) else None
        while True:
            if not visitor.buffer:
                visitor.begin(IDLE, self._keepalive_timeout)
                if quick is not None and not await quick.wait(visitor):
                    break
                if visitor.request is None and not visitor.buffer:
                    visitor.buffer = await receive()
                    if not visitor.buffer:
                        return
            else:  # pipelined, or passed on by another process: it waits for an answer, so nobody takes it for idle
                visitor.begin(ANSWER, self._keepalive_timeout)
                await trio.lowlevel.checkpoint()  # refusals wait for nothing, and others want to run
            if visitor.request is None:
                visitor.phase = HEAD
            if not await serving.serve(visitor):
                break
            visitor.rest()
            if visitor.guest is not None:
                serving.forwarding.leave(visitor)
            if quick is None:
                receive = visitor.socket.recv_later  # who has just been answered has sent nothing yet
        await self._close(visitor)

    async def _close(self, visitor: Visitor) -> None:
        """End the connection so that the visitor can read the answer even if it is still sending (RFC 9112, 9.6)."""
        if visitor.socket.is_closed:
            return
        visitor.begin(BODY, LINGER)
        await visitor.socket.finish()
        while await visitor.socket.recv():
            pass


def _report(exc: OSError | None) -> None:
    if exc is None:
        log.info("visitors are accepted again")
    else:
        log.error("can't accept visitors now", error=exc.strerror or exc)
