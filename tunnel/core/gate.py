"""Where agents come in: one nursery for each connection, which owns its reader, its writer and its life.

(1) TLS and WebSocket; (2) hello: version, token, names; (3) welcome, and the link serves; (4) its end, whoever ends
it. Until the welcome everything has one deadline. A refusal says its reason to the agent, to the log and to the layers.
"""

from __future__ import annotations

import itertools
import math
import os
import socket as stdlib_socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import trio

from tunnel import __version__
from tunnel.core.accounts import Accounts
from tunnel.core.certificates import Certificates
from tunnel.core.crowds import SHARE, Crowds
from tunnel.core.database import StoreError
from tunnel.core.hostnames import check_name, readable_name
from tunnel.core.limits import Counts, Failures, Rate, Waiting
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.core.reports import Reports
from tunnel.core.siblings import Siblings
from tunnel.core.tcp import Ports
from tunnel.core.tokens import Grant
from tunnel.errors import CREDENTIAL_REFUSALS, Refused, TunnelError, WireError
from tunnel.handler import ConnectVisit, Layer, LinkVisit, wrap
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
from tunnel.wire.control import Hello, RefusedMessage, TunnelGrant, TunnelRequest, Welcome
from tunnel.wire.held import Held

log = get_logger("tunnel.core")

MAX_TUNNELS = 100  #: tunnels one agent may ask for
MAX_INSTANCE = 128  #: characters of an agent's instance that are kept
FAREWELL = 5.0  #: seconds that an agent which said GOAWAY, and has no streams, has to close its link itself
PARTING = 2.0  #: seconds for a polite close to leave
MAX_LINK_NAME = 32  #: of what tells its links apart


class _Connect(ConnectVisit, kw_only=True):
    """A connection on its way to being a link."""

    socket: Socket
    place: Any  # its address as the kernel says it
    nursery: trio.Nursery
    evicted: bool = False  # it made room for another one
    deadline: float = math.inf  # trio's clock: the welcome's
    agent: AgentLink | None = None

    @property
    def address(self) -> str:
        address: str = self.place[0]
        return address.removeprefix("::ffff:")

    def evict(self) -> None:
        self.evicted = True
        self.socket.close()


class _Attached(LinkVisit, kw_only=True):
    """farewell: seconds that its last requests have once it has said GOAWAY."""

    grant: Grant
    farewell: float
    agent: AgentLink | None = None


class Gate:
    """Lets agents in. url_of: what visitors type for a tunnel. refusals: where refusals for limits are counted.

    protocol_errors: links and would-be links that broke the protocol.
    """

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
        self.is_draining = False
        self.protocol_errors = 0
        self._registry = registry
        self._accounts = accounts
        self._ports = ports
        self._reports = reports
        self._sweeper = sweeper
        self._url_of = url_of
        self._tls = tls
        self._max_connections = max_connections
        self._max_streams = max_streams
        self._address_share = address_share
        self._auth_timeout = auth_timeout
        self._heartbeat = heartbeat
        self._heartbeat_timeout = heartbeat_timeout
        self._handle_connect = wrap(self._connect, layers)
        self._handle_link = wrap(self._attached, layers)
        self._ids = itertools.count(1)
        self._run_id = os.urandom(3).hex()
        self._refusals = refusals
        self._waiting = Waiting(max_attaching)
        self._rate = rate or Rate(0)
        self._failures = Failures()
        self._litter = Litter()
        self._held = held
        self._ready = ready
        self._max_link_queue = max_link_queue
        self._windows = (stream_window, link_window)
        self._siblings = siblings
        self._drain_timeout = drain_timeout
        self._round_trips: deque[float] = deque(maxlen=10_000)

    async def accept(self, listener: stdlib_socket.socket, nursery: trio.Nursery) -> None:
        """Take agents from a listener until cancelled; their connections are tasks of `nursery`."""
        await accept_each(listener, self._serve, nursery, _report)

    # What others may ask --------------------------------------------------------------------------------------

    def take_round_trips(self) -> list[float]:
        for agent in self._registry.links.values():
            self._round_trips.extend(agent.link.round_trips)
            agent.link.round_trips.clear()
        taken = list(self._round_trips)
        self._round_trips.clear()
        return taken

    def recheck(self) -> None:
        """Accounts, tokens or names have changed: end the links that may be there no longer.

        A link ends too with one of its names lost: its agent would be refused with that name if it came now.
        """
        for agent in list(self._registry.links.values()):
            visit = agent.visit
            assert isinstance(visit, _Attached)
            refusal = self._accounts.check(visit.grant)
            if refusal is not None:
                self._revoke(agent, refusal)
        for name, (account_id, refusal) in self._accounts.take_lost().items():
            tunnel = self._registry.tunnels.get(name)
            if tunnel is None or tunnel.account_id != account_id:
                continue
            for agent in list(tunnel.links):
                self._revoke(agent, refusal)
            is_served = bool(tunnel.links)
            self._registry.forget(tunnel)
            if is_served and tunnel.protocol == "tcp":
                self._ports.close(tunnel)
            log.info("name taken from its account", tunnel=name, account_id=account_id, reason=refusal.reason)

    def _revoke(self, agent: AgentLink, refusal: Refused) -> None:
        visit, link = agent.visit, agent.link
        if link.end_reason:
            return
        log.info(
            "link revoked",
            agent_id=visit.agent_id,
            connection_id=visit.connection_id,
            reason=refusal.reason,
            **visit.parent.trace_fields,
        )
        link.session.control(frames.REFUSED, control.encode(RefusedMessage(refusal.reason, str(refusal))))
        link.close(str(refusal))

    def send_away(self, reason: str) -> None:
        """Drain: tell the agents to finish and to go elsewhere; new links are refused."""
        self.is_draining = True
        for agent in self._registry.links.values():
            agent.visit.state = "draining"
            agent.link.session.control(frames.GOAWAY, control.pack_goaway(reason))

    def close_links(self, reason: str) -> None:
        for agent in list(self._registry.links.values()):
            agent.link.close(reason)

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
        connect: _Connect | None = None
        try:
            async with open_pair() as nursery:
                connection_id = f"conn-{self._run_id}-{next(self._ids)}"
                connect = _Connect(address_text(address), connection_id, socket=socket, place=address, nursery=nursery)
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
            detail = "it was silent and made room for others" if evicted else str(exc)
            self._refusals["attaching"] += evicted
            traced = connect.trace_fields if connect is not None else {}
            log.info("agent connection ended early", detail=detail, remote=remote, **traced)
        except Exception as exc:  # a bug costs this one link
            traced = connect.trace_fields if connect is not None else {}
            log.error("agent connection broke", remote=remote, error=exc, **traced)
        finally:
            (socket if connect is None else connect.socket).close()
            self._litter.drop(len(self._registry.links))

    async def _is_for_another(self, connect: _Connect, siblings: Siblings) -> bool:
        with trio.move_on_after(self._auth_timeout) as scope:
            return await siblings.pass_agent(connect.socket, connect.place)
        assert scope.cancelled_caught
        self._refusals["attaching_time"] += 1
        raise TunnelError(f"nothing came within {self._auth_timeout:g} s")

    async def _connect(self, visit: _Connect) -> None:
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
            self.protocol_errors += 1
            self._count(exc)
            raise Refused("protocol", str(exc)) from exc
        except BaseException as exc:
            visit.outcome, visit.error = "link_lost", str(exc) or type(exc).__name__
            raise

    async def _let_in(self, visit: _Connect) -> None:
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
            await self._welcome(visit, link, control.decode(Hello, payload))
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

    def _count(self, breach: WireError) -> None:
        if breach.limit:
            self._refusals[breach.limit] += 1

    async def _slow_down(self, visit: _Connect) -> None:
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

    async def _welcome(self, visit: _Connect, link: Link, hello: Hello) -> None:
        visit.agent_id = hello.agent_id[:128]
        if frames.VERSION not in hello.versions:
            raise Refused(
                "version",
                f"this core speaks link protocol {frames.VERSION}, and the agent does not: "
                f"install the agent of release {__version__}",
            )
        if self.is_draining:
            raise Refused("draining", "the core is shutting down; try again in a moment")
        grant = await self._accounts.authenticate(hello.token, hello.agent_id[:128], parent=visit)
        visit.account_id, visit.agent_id = grant.account_id, grant.agent_id
        if not 1 <= len(hello.tunnels) <= MAX_TUNNELS:
            raise Refused("bad_name", f"an agent serves between 1 and {MAX_TUNNELS} tunnels")
        account = await self._accounts.load(grant.account_id, parent=visit)
        names = [self._name(grant, request) for request in hello.tunnels]
        if len(set(names)) < len(names):
            raise Refused("bad_name", "two of the tunnels have the same name")
        instance = hello.instance[:MAX_INSTANCE]
        link_name = hello.link[:MAX_LINK_NAME]
        await self._supersede(grant, instance, link_name)
        siblings = self._siblings
        if siblings is None:
            self._check_room(grant, instance)
        for name, request in zip(names, hello.tunnels, strict=True):
            self._registry.check_free(name, request.protocol, grant.account_id)
            if siblings is not None:
                siblings.check_free(name, request.protocol, grant.account_id)
        attached = _Attached(
            visit, grant=grant, farewell=control.drain_seconds(hello.drain_timeout, self._drain_timeout)
        )
        agent = AgentLink(
            link,
            attached,
            account,
            min(self._max_streams, max(hello.max_streams, 1)),
            self._max_link_queue,
            instance,
            link_name,
            crowds=Crowds(self._address_share),
        )
        attached.agent, agent.is_welcomed = agent, False
        account.check_parting()
        if siblings is None:
            account.admit_link(instance)
        else:
            await self._admit(siblings, agent)
        revision = self._accounts.revision
        try:
            # After the limits: who may have no link takes no names, which are held for a while.
            await self._accounts.claim(names, grant.account_id)
            if siblings is None:
                self._check_room(grant, instance)  # others came while we waited
            grants = await self._attach(agent, names, hello.tunnels)
            if siblings is not None:
                await siblings.announce()
        except BaseException:
            await self._withdraw(agent)
            self._registry.detach(agent)
            raise
        if self._accounts.revision != revision:  # looked at without this link, after its names were claimed
            self._accounts.look_again()
        windows = self._windows_for(hello)
        link.session.set_windows(*windows)
        visit.agent = agent
        agent.is_welcomed = True
        link.session.control(
            frames.WELCOME,
            control.encode(
                Welcome(
                    frames.VERSION,
                    __version__,
                    visit.connection_id,
                    grant.account_id,
                    grant.agent_id,
                    grants,
                    stream_window=windows[0],
                    link_window=windows[1],
                    drain_timeout=self._drain_timeout,
                    **self._place(hello),
                )
            ),
        )

    def _windows_for(self, hello: Hello) -> tuple[int, int]:
        """Of a stream and of the link: ours, or what the agent has room for."""
        stream, link = self._windows
        if hello.link_window > 0:
            link = min(link, max(hello.link_window, frames.LEAST_WINDOW))
        return min(stream, link), link

    def _check_room(self, grant: Grant, instance: str) -> None:
        """An agent that has a link has a place. Raises Refused."""
        agents = self._registry.agents
        if len(agents) >= self._max_connections and (grant.account_id, instance) not in agents:
            raise Refused("too_many_connections", f"the core has its {self._max_connections} links; try again later")

    async def _admit(self, siblings: Siblings, agent: AgentLink) -> None:
        account = agent.account
        account.check_links(agent.instance)
        connection_id = agent.visit.connection_id
        try:
            await siblings.admit(account.id, agent.instance, connection_id, account.link_limit, self._max_connections)
        except Refused as exc:
            account.exceeded["connection"] += exc.reason == "connection_quota"
            raise
        account.add_link(agent.instance)

    def _place(self, hello: Hello) -> dict[str, Any]:
        """Where this is, for an agent that keeps a link to each worker."""
        siblings = self._siblings
        if siblings is None or control.WORKERS not in hello.capabilities:
            return {}
        return {
            "capabilities": [control.WORKERS],
            "workers": siblings.count,
            "worker": siblings.number,
            "core": siblings.core,
        }

    def _name(self, grant: Grant, request: TunnelRequest) -> str:
        if request.protocol not in ("http", "tcp"):
            raise Refused("bad_name", f"there are tunnels for http and tcp, not {request.protocol[:20]!r}")
        if not request.name:
            return readable_name(grant.account_id, grant.agent_id, request.local)
        return self._registry.name_of(check_name(request.name))

    async def _supersede(self, grant: Grant, instance: str, link_name: str) -> None:
        """An agent that dials again while we still wait for its old link knows better than we do."""
        for old in self._registry.links_of(instance):
            if (old.instance, old.name, old.account.id) == (instance, link_name, grant.account_id):
                old.link.end("the agent has dialled again")
                await self._withdraw(old)
                self._registry.detach(old)

    async def _attach(
        self, agent: AgentLink, names: Sequence[str], requests: Sequence[TunnelRequest]
    ) -> list[TunnelGrant]:
        grants = []
        for index, (name, request) in enumerate(zip(names, requests, strict=True)):
            tunnel = self._registry.attach(agent, name, request.protocol, index)
            if tunnel.protocol == "tcp":
                await self._ports.open(tunnel)
            tunnel.url = self._url_of(tunnel)
            grants.append(TunnelGrant(name, tunnel.protocol, tunnel.url))
        return grants

    async def _withdraw(self, agent: AgentLink) -> None:
        """The link serves nothing new; names that it served alone are held from now. Safe to call again."""
        if agent.withdrawn:
            return
        agent.withdrawn = True
        agent.account.drop_link(agent.instance)
        if self._siblings is not None:
            self._siblings.drop(agent.visit.connection_id)
        emptied = self._registry.withdraw(agent)
        for tunnel in emptied:
            if tunnel.protocol == "tcp":
                self._ports.close(tunnel)
        if emptied:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self._accounts.release([tunnel.name for tunnel in emptied], agent.account.id)

    async def _see_off(self, link: Link, seconds: float) -> None:
        """End the link of an agent that said GOAWAY and does not do it: it serves nobody, and is one more to keep."""
        with trio.move_on_after(seconds):
            while True:
                await trio.sleep(FAREWELL)
                if not link.session.streams:
                    break
        link.close("the agent said GOAWAY and had time to finish")
        await trio.sleep(PARTING)
        link.end("the agent does not read")

    async def _attached(self, visit: _Attached) -> None:
        """The innermost handler of a link visit: until the link ends."""
        agent = visit.agent
        assert agent is not None
        link = agent.link
        self._sweeper.add(link)
        self._reports.begin(visit.account_id, visit.agent_id, visit.connection_id, agent.instance)
        log.info(
            "agent connected",
            agent_id=visit.agent_id,
            account_id=visit.account_id,
            connection_id=visit.connection_id,
            remote=visit.remote,
            tunnels=sorted(agent.indexes),
            **visit.parent.trace_fields,
        )
        try:
            while True:
                kind, payload = await link.receive_control()
                if kind == frames.REPORT:
                    self._reports.take(visit.account_id, visit.agent_id, visit.connection_id, payload)
                elif kind == frames.GOAWAY:
                    # The agent finishes what it has; new requests go to others or find no agent.
                    visit.state = "draining"
                    if link.nursery is not None and not agent.withdrawn:
                        link.nursery.start_soon(self._see_off, link, visit.farewell)
                    await self._withdraw(agent)
        except trio.EndOfChannel:
            visit.outcome = "ok" if self.is_draining or agent.withdrawn else "link_lost"
            visit.error = "" if visit.outcome == "ok" else link.end_reason
        finally:
            self._sweeper.discard(link)
            self._round_trips.extend(link.round_trips)
            if link.breach is not None:
                self.protocol_errors += 1
                self._count(link.breach)
            self._reports.end(visit.account_id, visit.agent_id, visit.connection_id)
            await self._withdraw(agent)
            self._registry.detach(agent)
            log.info(
                "agent disconnected",
                agent_id=visit.agent_id,
                account_id=visit.account_id,
                connection_id=visit.connection_id,
                reason=link.end_reason,
                lasted=f"{monotonic() - visit.started:.1f}s",
                **visit.parent.trace_fields,
            )


def _report(exc: OSError | None) -> None:
    if exc is None:
        log.info("agents are accepted again")
    else:
        log.error("can't accept agents now", error=exc.strerror or exc)
