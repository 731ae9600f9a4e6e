"""Where agents come in: one nursery for each connection, which owns its reader, its writer and its life.

(1) TLS and WebSocket; (2) hello, and (3) the welcome (tunnel/core/admission.py); (4) the link serves until it ends,
whoever ends it (tunnel/core/links.py). Until the welcome everything has one deadline. A refusal says its reason to the
agent, to the log and to the layers.
"""

from __future__ import annotations

import itertools
import math
import os
import socket as stdlib_socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import trio

from tunnel.core.accounts import Accounts
from tunnel.core.admission import Admission, Connecting
from tunnel.core.certificates import Certificates
from tunnel.core.crowds import SHARE
from tunnel.core.database import StoreError
from tunnel.core.early import why_early
from tunnel.core.limits import Counts, Failures, Rate, Waiting
from tunnel.core.links import PARTING, Links
from tunnel.core.registry import Registry, Tunnel
from tunnel.core.reports import Reports
from tunnel.core.siblings import Siblings
from tunnel.core.tcp import Ports
from tunnel.errors import CREDENTIAL_REFUSALS, Refused, TunnelError, WireError
from tunnel.handler import Layer, wrap
from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.listening import accept_each
from tunnel.log import get_logger
from tunnel.net import Socket, address_text, with_tls
from tunnel.ready import Ready
from tunnel.tuning import Litter
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, RefusedMessage
from tunnel.wire.held import Held

log = get_logger("tunnel.core")


class Gate:
    """Lets agents in; `links` are those that are. url_of: what visitors type for a tunnel. refusals: where refusals for
    limits are counted."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        ports: Ports,
        reports: Reports,
        sweeper: Sweeper,
        layers: Sequence[Layer],
        url_of: Callable[[Tunnel], str],
        *,
        tls: Certificates | None,
        max_connections: int,
        max_streams: int,
        address_share: int = SHARE,
        auth_timeout: float,
        heartbeat: float,
        heartbeat_timeout: float,
        refusals: Counts,
        max_attaching: int = 1000,
        rate: Rate | None = None,
        held: Held | None = None,
        ready: Ready | None = None,
        max_link_queue: float = math.inf,
        stream_window: int = frames.STREAM_WINDOW,
        link_window: int = frames.LINK_WINDOW,
        siblings: Siblings | None = None,
        drain_timeout: float = 30.0,
    ) -> None:
        self._admission = Admission(
            registry,
            accounts,
            ports,
            siblings,
            url_of,
            max_connections=max_connections,
            max_streams=max_streams,
            address_share=address_share,
            max_link_queue=max_link_queue,
            windows=(stream_window, link_window),
            drain_timeout=drain_timeout,
        )
        self.links = Links(registry, accounts, ports, reports, sweeper, self._admission, refusals)
        self._registry = registry
        self._tls = tls
        self._auth_timeout = auth_timeout
        self._heartbeat = heartbeat
        self._heartbeat_timeout = heartbeat_timeout
        self._handle_connect = wrap(self._connect, layers)
        self._handle_link = wrap(self.links.serve, layers)
        self._ids = itertools.count(1)
        self._run_id = os.urandom(3).hex()
        self._refusals = refusals
        self._waiting = Waiting(max_attaching)
        self._rate = rate or Rate(0)
        self._failures = Failures()
        self._litter = Litter()
        self._held = held
        self._ready = ready
        self._siblings = siblings

    async def accept(self, listener: stdlib_socket.socket, nursery: trio.Nursery) -> None:
        """Take agents from a listener until cancelled; their connections are tasks of `nursery`."""
        await accept_each(listener, self._serve, nursery, _report)

    # One connection -------------------------------------------------------------------------------------------

    async def _serve(self, socket: Socket, address: Any) -> None:
        if not self._rate.take(address[0].removeprefix("::ffff:")):
            self._refusals["handshakes"] += 1
            socket.close()
            return
        await self._take(socket, address, self._siblings)

    async def adopt(self, socket: Socket, address: Any) -> None:
        """Serve an agent's connection that another worker of this core has accepted."""
        await self._take(socket, address, None)

    async def _take(self, socket: Socket, address: Any, siblings: Siblings | None) -> None:
        """siblings: who it may be meant for."""
        remote = address_text(address)
        connect: Connecting | None = None
        try:
            async with open_pair() as nursery:
                connection_id = f"conn-{self._run_id}-{next(self._ids)}"
                connect = Connecting(
                    address_text(address), connection_id, socket=socket, place=address, nursery=nursery
                )
                if not self._waiting.enter(connect.address, connect, connect.evict):
                    self._refusals["attaching"] += 1
                    return
                try:
                    if siblings is not None and await self._is_for_another(connect, siblings):
                        nursery.cancel_scope.cancel()
                        return
                    await self._handle_connect(connect)
                finally:
                    self._waiting.leave(connect.address, connect)
                agent = connect.agent
                assert agent is not None
                await self._handle_link(agent.visit)
                with trio.move_on_after(PARTING):  # its last words are on the way
                    await agent.link.ended.wait()
                nursery.cancel_scope.cancel()
        except Refused as exc:
            assert connect is not None
            log.warning(
                "authentication failed" if exc.reason in CREDENTIAL_REFUSALS else "agent refused",
                reason=exc.reason,
                detail=str(exc),
                agent_id=connect.agent_id,
                account_id=connect.account_id,
                remote=remote,
                **connect.trace_fields,
            )
        except (TunnelError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as exc:
            evicted = connect is not None and connect.evicted
            detail = "it was silent and made room for others" if evicted else why_early(exc)
            self._refusals["attaching"] += evicted
            traced = connect.trace_fields if connect is not None else {}
            log.info("agent connection ended early", detail=detail, remote=remote, **traced)
        except Exception as exc:  # a bug costs this one link
            traced = connect.trace_fields if connect is not None else {}
            log.error("agent connection broke", remote=remote, error=exc, **traced)
        finally:
            (socket if connect is None else connect.socket).close()
            self._litter.drop(len(self._registry.links))

    async def _is_for_another(self, connect: Connecting, siblings: Siblings) -> bool:
        with trio.move_on_after(self._auth_timeout) as scope:
            return await siblings.pass_agent(connect.socket, connect.place)
        assert scope.cancelled_caught
        self._refusals["attaching_time"] += 1
        raise TunnelError(f"nothing came within {self._auth_timeout:g} s")

    async def _connect(self, visit: Connecting) -> None:
        """The innermost handler of a connect visit. Raises Refused, TunnelError and the socket's errors."""
        try:
            with trio.fail_after(self._auth_timeout) as scope:
                visit.deadline = scope.deadline
                await self._let_in(visit)
            visit.outcome = "ok"
        except trio.TooSlowError:
            visit.outcome, visit.reason, visit.error = "refused", "timeout", "no hello in time"
            self._refusals["attaching_time"] += 1
            raise Refused("timeout", f"nothing valid came within {self._auth_timeout:g} s") from None
        except Refused as exc:
            visit.outcome, visit.reason, visit.error = "refused", exc.reason, str(exc)
            raise
        except WireError as exc:
            visit.outcome, visit.reason, visit.error = "refused", "protocol", str(exc)
            self.links.note_breach(exc)
            raise Refused("protocol", str(exc)) from exc
        except BaseException as exc:
            visit.outcome, visit.error = "link_lost", str(exc) or type(exc).__name__
            raise

    async def _let_in(self, visit: Connecting) -> None:
        if self._tls is not None:
            visit.socket = with_tls(visit.socket, self._tls.context, server_side=True)
            await visit.socket.handshake()
        link = Link(True, self._heartbeat, self._heartbeat_timeout, held=self._held, ready=self._ready)
        carrier = await transport.accept(visit.nursery, visit.socket, link.on_message, allowance=frames.MAX_ATTACHING)
        visit.nursery.start_soon(link.run, carrier)
        try:
            kind, payload = await link.receive_control()
            self._waiting.heard(visit.address, visit)
            if kind != frames.HELLO:
                raise WireError(f"the first frame is {frames.NAMES[kind]}, not HELLO")
            await self._admission.welcome(visit, link, control.decode(Hello, payload))
            carrier.welcome()
        except trio.EndOfChannel:
            if link.breach is not None:
                raise link.breach from None
            raise TunnelError(f"the link ended before the hello: {link.end_reason}") from None
        except (Refused, WireError, StoreError) as exc:
            if isinstance(exc, Refused) and exc.reason in CREDENTIAL_REFUSALS:
                await self._slow_down(visit)  # whoever guesses tokens learns little in a day
            await self._say_no(link, exc)
            if isinstance(exc, StoreError):
                raise Refused("unavailable", str(exc)) from exc
            raise

    async def _slow_down(self, visit: Connecting) -> None:
        """Wait the longer the more such refusals the address had."""
        delay = self._failures.note(visit.address)
        if delay:
            self._refusals["failed_logins"] += 1
            await trio.sleep(min(delay, max(0.0, (visit.deadline - trio.current_time()) / 2)))

    async def _say_no(self, link: Link, exc: TunnelError) -> None:
        """Tell the agent why, and let that arrive."""
        if isinstance(exc, Refused):
            message = RefusedMessage(exc.reason, str(exc))
        elif isinstance(exc, WireError):
            message = RefusedMessage("protocol", str(exc))
        else:
            message = RefusedMessage("unavailable", "the core can't reach its store now", 5)
        link.session.control(frames.REFUSED, control.encode(message))
        link.close(str(exc))
        with trio.move_on_after(2):
            await link.ended.wait()


def _report(exc: OSError | None) -> None:
    if exc is None:
        log.info("agents are accepted again")
    else:
        log.error("can't accept agents now", error=exc.strerror or exc)
