"""Who serves which name: tunnels, the links that serve them, and names that are held for a while after the last link.

Names are a subdomain of the base domain (one label), or a full host name. Decisions are sync, in memory; the store is
asked only about names that nobody serves here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import monotonic

from tunnel.core.crowds import Crowds
from tunnel.core.domain import Domain
from tunnel.core.quotas import Account
from tunnel.errors import Failure, Refused
from tunnel.handler import LinkVisit
from tunnel.link.link import Link


@dataclass(eq=False, slots=True)
class AgentLink:
    """An attached link and what it serves. `indexes`: tunnel name → its index in OPEN frames.

    Who opens a stream for a visitor has it counted in `crowds`, and takes it out again.
    """

    link: Link
    visit: LinkVisit
    account: Account
    max_streams: int
    max_queue: float = math.inf  # bytes that may wait to be sent to it before it gets no new requests
    instance: str = ""
    name: str = ""  # tells links of one instance apart
    indexes: dict[str, int] = field(default_factory=dict)
    withdrawn: bool = False  # serves nothing new; its account has it no more
    is_welcomed: bool = True  # before its WELCOME is on the way it gets no requests
    probes: set[int] = field(default_factory=set)  # numbers of streams that take no visitor's place while they are open
    crowds: Crowds = field(default_factory=Crowds)

    @property
    def free_places(self) -> int:
        """Streams that visitors may still have."""
        streams = self.link.session.streams
        free = self.max_streams - len(streams)
        return free + sum(one in streams for one in self.probes) if self.probes else free

    @property
    def has_room(self) -> bool:
        return self.has_room_for("")

    def has_room_for(self, crowd: str) -> bool:
        """crowd: what the visitor's address counts as (tunnel.core.crowds)."""
        free = self.free_places
        if free <= 0 or not self.is_welcomed or self.link.session.queued_bytes >= self.max_queue:
            return False
        return not crowd or self.crowds.may_enter(crowd, free)

    def check_room_for(self, crowd: str) -> None:
        """Right before a stream is opened by who could not do so when the link was chosen. Raises Failure."""
        if not self.has_room_for(crowd):
            raise full([self])


@dataclass(eq=False, slots=True)
class Tunnel:
    """A name in service or held. url: what visitors type."""

    name: str
    protocol: str
    account_id: str
    url: str = ""
    port: int = 0  # of a TCP tunnel
    links: list[AgentLink] = field(default_factory=list)
    held_until: float = 0.0
    turn: int = 0

    def choose(self, tried: Collection[AgentLink] = (), crowd: str = "") -> AgentLink:
        """The next link in turn that has room, rather one that was heard of lately. Raises Failure.

        tried: those that this request has been refused by. crowd: what its visitor's address counts as.
        """
        links = [one for one in self.links if one not in tried] if tried else self.links
        count = len(links)
        if count == 1 and links[0].has_room_for(crowd):
            return links[0]
        links = [one for one in links if one.is_welcomed]
        count = len(links)
        if not count:
            raise Failure("no_agent")
        now = monotonic()
        second: AgentLink | None = None
        for step in range(count):
            index = (self.turn + step) % count
            one = links[index]
            if one.has_room_for(crowd):
                if not one.link.is_quiet(now):
                    self.turn = index + 1
                    return one
                second = second or one
        if second is None:
            raise full(links)
        return second


def full(links: Sequence[AgentLink]) -> Failure:
    """None of these links has room: by which limit."""
    if any(one.has_room for one in links):
        return Failure("overloaded", retry_after=1, limit="streams_per_address")
    if any(one.free_places > 0 for one in links):
        return Failure("overloaded", "the link to the agent is full", retry_after=1, limit="link_buffer")
    return Failure("overloaded", retry_after=1, limit="link_streams")


class Registry:
    """hold: seconds that an unreserved name stays its account's after its last link."""

    def __init__(self, base_domain: str, hold: float, clock: Callable[[], float] = monotonic) -> None:
        self.links: dict[str, AgentLink] = {}  # by connection id
        self.tunnels: dict[str, Tunnel] = {}
        #: links by agent: account and instance; one that does not say which run it is counts by link
        self.agents: Counter[tuple[str, str]] = Counter()
        self._by_instance: dict[str, list[AgentLink]] = {}
        #: hears of each tunnel that gets its first link here (True) or has lost its last one
        self.on_change: Callable[[Tunnel, bool], None] | None = None
        self.domain = Domain(base_domain)
        self._hold = hold
        self._clock = clock
        #: the tunnel name that a (normalised) host name means; visitors ask for the same ones again and again
        self.name_of: Callable[[str], str] = lru_cache(1024)(self.domain.name_of)

    def find(self, host: str) -> Tunnel | None:
        """The tunnel in service or held under this host name."""
        tunnel = self.tunnels.get(self.name_of(host))
        if tunnel is None or (tunnel.name == host and "." not in host):  # a bare word is no host name of ours
            return None
        if not tunnel.links and self._clock() > tunnel.held_until:
            return None
        return tunnel

    def _find_name(self, name: str) -> Tunnel | None:
        tunnel = self.tunnels.get(name)
        if tunnel is not None and not tunnel.links and self._clock() > tunnel.held_until:
            return None
        return tunnel

    def names_in_use(self) -> dict[str, str]:
        """Account ids by the name that they serve now."""
        return {tunnel.name: tunnel.account_id for tunnel in self.tunnels.values() if tunnel.links}

    def known_names(self) -> dict[str, str]:
        """Account ids by the names that are served or held."""
        return {tunnel.name: tunnel.account_id for tunnel in self.tunnels.values()}

    def check_free(self, name: str, protocol: str, account_id: str) -> None:
        """Raises Refused(name_taken) when the name is another's, or serves another protocol."""
        tunnel = self._find_name(name)
        if tunnel is None:
            return
        if tunnel.account_id != account_id:
            left = tunnel.held_until - self._clock()
            how = "in use by" if tunnel.links else f"held for {left:.0f} s more for"
            raise Refused("name_taken", f"the name {name} is {how} another account; choose another one")
        if tunnel.links and tunnel.protocol != protocol:
            raise Refused("name_taken", f"the name {name} is in use for {tunnel.protocol.upper()} by another agent")

    def attach(self, agent: AgentLink, name: str, protocol: str, index: int) -> Tunnel:
        """Let a link serve a name. Raises Refused(name_taken)."""
        account_id = agent.account.id
        self.check_free(name, protocol, account_id)
        tunnel = self.tunnels.get(name)
        if tunnel is None or tunnel.account_id != account_id or tunnel.protocol != protocol:
            tunnel = self.tunnels[name] = Tunnel(name, protocol, account_id)
        tunnel.links.append(agent)
        agent.indexes[name] = index
        if self.links.get(agent.visit.connection_id) is not agent:
            self.links[agent.visit.connection_id] = agent
            self._by_instance.setdefault(agent.instance, []).append(agent)
            self.agents[_agent_of(agent)] += 1
            agent.account.attach()
        if len(tunnel.links) == 1 and self.on_change is not None:
            self.on_change(tunnel, True)
        return tunnel

    def withdraw(self, agent: AgentLink) -> list[Tunnel]:
        """The link serves nothing new. Returns the tunnels that it was the last one of; their names are held now."""
        emptied: list[Tunnel] = []
        for name in agent.indexes:
            tunnel = self.tunnels.get(name)
            if tunnel is not None and agent in tunnel.links:
                tunnel.links.remove(agent)
                if not tunnel.links:
                    tunnel.held_until = self._clock() + self._hold
                    emptied.append(tunnel)
                    if self.on_change is not None:
                        self.on_change(tunnel, False)
        return emptied

    def detach(self, agent: AgentLink) -> None:
        """The link is gone; `withdraw` it first."""
        if self.links.get(agent.visit.connection_id) is not agent:
            return
        del self.links[agent.visit.connection_id]
        agent.account.detach()
        self.agents[_agent_of(agent)] -= 1
        if not self.agents[_agent_of(agent)]:
            del self.agents[_agent_of(agent)]
        others = self._by_instance[agent.instance]
        others.remove(agent)
        if not others:
            del self._by_instance[agent.instance]

    def links_of(self, instance: str) -> list[AgentLink]:
        """The links of this run of an agent; none of one that does not say which run it is."""
        return list(self._by_instance.get(instance, ())) if instance else []

    def forget(self, tunnel: Tunnel) -> None:
        """The name is its account's no longer: whoever still has a link for it serves it no more, nor is it held."""
        if self.tunnels.get(tunnel.name) is not tunnel:
            return
        del self.tunnels[tunnel.name]
        is_served = bool(tunnel.links)
        tunnel.links.clear()
        tunnel.held_until = 0.0
        if is_served and self.on_change is not None:
            self.on_change(tunnel, False)

    def forget_expired(self) -> list[Tunnel]:
        """Drop names whose hold is over."""
        now = self._clock()
        gone = [tunnel for tunnel in self.tunnels.values() if not tunnel.links and now > tunnel.held_until]
        for tunnel in gone:
            del self.tunnels[tunnel.name]
        return gone


def _agent_of(link: AgentLink) -> tuple[str, str]:
    return link.account.id, link.instance or link.visit.connection_id
