"""From an agent's hello to its welcome: version, token, limits, names; and how its names go out of service again.

A refusal is raised, with a reason of `tunnel.errors.REFUSALS`; the gate says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import trio

from tunnel import __version__
from tunnel.core.accounts import Accounts
from tunnel.core.crowds import Crowds
from tunnel.core.hostnames import check_name, readable_name
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.core.siblings import Siblings
from tunnel.core.tcp import Ports
from tunnel.core.tokens import Grant
from tunnel.errors import Refused
from tunnel.handler import ConnectVisit, LinkVisit
from tunnel.link.link import Link
from tunnel.net import Socket
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, TunnelGrant, TunnelRequest, Welcome

MAX_TUNNELS = 100  #: tunnels one agent may ask for
MAX_INSTANCE = 128  #: characters of an agent's instance that are kept
MAX_LINK_NAME = 32  #: of what tells its links apart


class Connecting(ConnectVisit, kw_only=True):
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


class Attached(LinkVisit, kw_only=True):
    """farewell: seconds that its last requests have once it has said GOAWAY."""

    grant: Grant
    farewell: float
    agent: AgentLink | None = None


class Admission:
    """url_of: what visitors type for a tunnel. windows: of a stream and of a link. drain_timeout: seconds that the
    core's last requests get, and an agent's where it does not say."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        ports: Ports,
        siblings: Siblings | None,
        url_of: Callable[[Tunnel], str],
        *,
        max_connections: int,
        max_streams: int,
        address_share: int,
        max_link_queue: float,
        windows: tuple[int, int],
        drain_timeout: float,
    ) -> None:
        self.is_draining = False
        self._registry = registry
        self._accounts = accounts
        self._ports = ports
        self._siblings = siblings
        self._url_of = url_of
        self._max_connections = max_connections
        self._max_streams = max_streams
        self._address_share = address_share
        self._max_link_queue = max_link_queue
        self._windows = windows
        self._drain_timeout = drain_timeout

    async def welcome(self, visit: Connecting, link: Link, hello: Hello) -> None:
        """Attach the link and say so, or raise Refused (StoreError where the store is away)."""
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
        attached = Attached(
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
            await self.withdraw(agent)
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
                await self.withdraw(old)
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

    async def withdraw(self, agent: AgentLink) -> None:
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
