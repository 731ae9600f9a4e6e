"""TCP tunnels: a public port for each, raw bytes both ways, with half-close and back-pressure."""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import trio

from tunnel.core.crowds import crowd_of
from tunnel.core.exchange import Exchanger
from tunnel.core.joining import join
from tunnel.core.limits import Place, Shares
from tunnel.core.ports import PortSource
from tunnel.core.proxied import ProxyHeaderError, ProxyHeaders, read_header
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.core.siblings import Siblings
from tunnel.core.visitor import RAW, Visitor
from tunnel.errors import OUTCOMES, Failure, Refused
from tunnel.handler import Layer, StreamVisit, wrap
from tunnel.link.stream import RawStream, Stream
from tunnel.listening import accept_each
from tunnel.log import get_logger
from tunnel.net import Socket, address_text
from tunnel.wire import frames
from tunnel.wire.frames import UNKNOWN, Open

log = get_logger("tunnel.core")


class _Stream(StreamVisit, kw_only=True):
    visitor: Visitor
    agent: AgentLink
    stream: Stream | None = None


def _note(visitor: Visitor, tunnel: Tunnel, visit: _Stream | None, failure: Failure | None) -> None:
    """The one record of a connection, in the fields of the access log. visit: None where it was turned away."""
    fields: dict[str, Any] = {"tunnel": tunnel.name, "client": visitor.address}
    fields["outcome"] = failure.outcome if failure is not None else visit.outcome if visit is not None else ""
    if visit is not None:
        fields["duration"] = f"{monotonic() - visit.started:.3f}s"
        for name in ("bytes_in", "bytes_out", "agent_id", "account_id", "trace_id", "span_id"):
            if (value := getattr(visit, name)) != "":
                fields[name] = value
    if failure is None:
        log.info("tcp connection", **fields)
    elif OUTCOMES[failure.outcome].failed:
        log.error("tcp connection failed", **fields, error=str(failure))
    else:
        log.info("tcp connection refused", **fields, reason=str(failure))


def _make_stream(visitor: Visitor, agent: AgentLink, tunnel: Tunnel) -> _Stream:
    return _Stream(
        None,
        "tcp",
        connection_id=agent.visit.connection_id,
        agent_id=agent.visit.agent_id,
        account_id=agent.account.id,
        tunnel=tunnel.name,
        offset=agent.link.offset,
        visitor=visitor,
        agent=agent,
    )


class Ports:
    """The public ports of TCP tunnels, as `source` gives them. The connections are tasks of `nursery`, the server's.
    shares: as the door's."""

    def __init__(
        self,
        source: PortSource,
        registry: Registry,
        exchanger: Exchanger,
        layers: Sequence[Layer],
        nursery: trio.Nursery,
        request_timeout: float,
        proxies: ProxyHeaders,
        shares: Shares,
        siblings: Siblings | None = None,
    ) -> None:
        self._siblings = siblings
        self._source = source
        self._registry = registry
        self._exchanger = exchanger
        self._nursery = nursery
        self._timeout = request_timeout
        self._handle = wrap(self._stream, layers)
        self._proxies = proxies
        self._shares = shares
        self._open: dict[str, trio.CancelScope] = {}
        self._opening = trio.Lock()

    async def open(self, tunnel: Tunnel) -> None:
        """Listen for a tunnel; sets `tunnel.port`. Raises Refused (no_port, port_quota)."""
        async with self._opening:
            if tunnel.name in self._open or not tunnel.links:
                return
            account = tunnel.links[0].account
            try:
                sockets = await self._source.take(account.id, tunnel.name, account.port_limit)
            except Refused as exc:
                account.exceeded["ports"] += exc.reason == "port_quota"
                raise
            if not tunnel.links:  # they ended while we waited
                for socket in sockets:
                    socket.close()
                self._source.give_back(tunnel.account_id, tunnel.name)
                return
            tunnel.port = sockets[0].getsockname()[1]
            scope = self._open[tunnel.name] = trio.CancelScope()
            for socket in sockets:
                self._nursery.start_soon(self._accept, socket, tunnel, scope)
        log.info("tcp port opened", tunnel=tunnel.name, port=tunnel.port)

    def close(self, tunnel: Tunnel) -> None:
        """Stop listening; open connections have ended with the link."""
        scope = self._open.pop(tunnel.name, None)
        if scope is not None:
            scope.cancel()
            self._source.give_back(tunnel.account_id, tunnel.name)

    def by_account(self) -> Mapping[str, int]:
        """Tunnels that have ports, by account id, as far as this process knows."""
        return self._source.by_account

    def sockets(self) -> dict[str, list[stdlib_socket.socket]]:
        """Those that listen now, by what a successor calls them."""
        return self._source.sockets()

    def close_all(self) -> None:
        for scope in self._open.values():
            scope.cancel()
        self._open.clear()

    async def _accept(self, socket: stdlib_socket.socket, tunnel: Tunnel, scope: trio.CancelScope) -> None:
        async def serve(connection: Socket, address: Any) -> None:
            await self._serve(connection, address, tunnel)

        with scope:
            await accept_each(socket, serve, self._nursery, lambda exc: None, self._shares.turn)

    async def _serve(self, socket: Socket, address: Any, tunnel: Tunnel) -> None:
        """One visitor's connection. There is nobody to tell what went wrong but the log: it is reset."""
        host = address[0].removeprefix("::ffff:")
        place = Place(self._shares)
        try:
            limit = place.take(host, self._comes_for_many(host))
            if not limit and self._proxies.expects(host):
                with trio.fail_after(self._timeout):
                    announced = (await read_header(socket)).address
                if announced:
                    host = announced
                    limit = place.take(host, self._comes_for_many(host))
            if limit:
                self._exchanger.refusals[limit] += 1
                socket.abort()
            else:
                await self._carry(Visitor(socket, host, "tcp", self._exchanger.refusals), tunnel)
        except (ProxyHeaderError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.warning("connection from a proxy refused", remote=address_text(address), reason=str(exc))
            socket.abort()
        except Exception as exc:  # a bug costs this one connection
            socket.abort()
            log.error("tcp connection broke", tunnel=tunnel.name, error=exc)
        finally:
            place.leave()
            socket.close()

    def _comes_for_many(self, host: str) -> bool:
        return self._proxies.expects(host) or self._exchanger.forwarding.is_trusted(host)

    async def adopt(self, socket: Socket, host: str, name: str, hops: int) -> None:
        """Serve a visitor whose connection another process of this core has taken."""
        self._shares.add(host)
        visitor = Visitor(socket, host, "tcp", self._exchanger.refusals)
        visitor.hops = hops
        try:
            tunnel = self._registry.tunnels.get(name)
            if tunnel is not None and tunnel.protocol == "tcp":
                await self._carry(visitor, tunnel)
            else:
                socket.abort()
        except Exception as exc:
            socket.abort()
            log.error("tcp connection broke", tunnel=name, error=exc)
        finally:
            self._shares.leave(host)
            socket.close()

    async def _carry(self, visitor: Visitor, tunnel: Tunnel) -> None:
        socket = visitor.socket
        visitor.phase, visitor.deadline = RAW, float("inf")
        visitor.crowd = "" if self._comes_for_many(visitor.address) else crowd_of(visitor.address)
        self._exchanger.active += 1
        visit: _Stream | None = None
        failure: Failure | None = None
        try:
            siblings = self._siblings
            is_full = siblings is not None and not any(link.has_room_for(visitor.crowd) for link in tunnel.links)
            if siblings is not None and is_full and siblings.take_tcp(visitor, tunnel.name):
                return
            agent = tunnel.choose(crowd=visitor.crowd)
            self._exchanger.check_memory()
            agent.account.admit_request()
            visit = _make_stream(visitor, agent, tunnel)
            await self._handle(visit)
        except Failure as exc:
            failure = exc
            socket.abort()
            if exc.limit:
                self._exchanger.refusals[exc.limit] += 1
            self._exchanger.recent.note_tcp(tunnel.name, tunnel.port, exc, visit)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            socket.abort()
        finally:
            self._exchanger.finished()
            if visit is not None or failure is not None:
                _note(visitor, tunnel, visit, failure)

    def _open_stream(self, visit: _Stream) -> Stream:
        """Raises Failure."""
        agent, crowd = visit.agent, visit.visitor.crowd
        agent.check_room_for(crowd)  # a layer may have waited since it was chosen
        context = "".join(f"{name}: {value}\r\n" for name, value in visit.headers.items()).encode("latin-1", "replace")
        opened = Open(frames.TCP, agent.indexes[visit.tunnel], int(self._timeout * 1000), UNKNOWN, context, b"")
        stream = agent.link.session.open(opened)
        assert isinstance(stream, Stream)
        visit.stream, visit.stream_id = stream, stream.id
        if crowd:
            agent.crowds.enter(crowd)
        return stream

    async def _stream(self, visit: _Stream) -> None:
        """The innermost handler of a TCP stream."""
        stream: Stream | None = None
        try:
            stream = self._open_stream(visit)
            with trio.move_on_after(self._timeout) as scope:
                await stream.answer()
            if scope.cancelled_caught:
                raise Failure("timeout", f"no connection within {self._timeout:g} s (the core's -request-timeout)")
            await join(RawStream(stream), visit.visitor, visit, visit.agent.account)
            visit.outcome = "ok"
        except Failure as exc:
            visit.outcome = exc.outcome
            visit.error = str(exc) if OUTCOMES[exc.outcome].failed else ""
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if stream is None or stream.failure is None:
                visit.outcome = "visitor_aborted"
                raise
            try:
                stream.raise_failure()
            except Failure as exc:
                visit.outcome, visit.error = exc.outcome, str(exc)
                raise
        except trio.Cancelled:
            visit.outcome = "draining"
            raise
        finally:
            if stream is not None and visit.visitor.crowd:
                visit.agent.crowds.leave(visit.visitor.crowd)
            self._exchanger.bytes_in += visit.bytes_in
            self._exchanger.bytes_out += visit.bytes_out
            if stream is not None and (not stream.is_over or stream.inbox):
                stream.reset(visit.outcome or "internal")
