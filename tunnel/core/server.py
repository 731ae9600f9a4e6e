"""The core: its parts, the order in which they start, and how they end.

Nurseries, from outside in: `background` (sweeper, watcher, pages), `handlers` (agents' and visitors' connections),
`accepting` (the listeners). A drain cancels the inner one at once and puts a deadline on the middle one. So does an
upgrade (tunnel/core/upgrade.py), after a successor has started with the same sockets and got the agents.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import trio

from tunnel.config import CoreSettings, data_dir, parse_address, parse_ports, sections
from tunnel.core.accounts import Accounts
from tunnel.core.board import AGENT_HANDSHAKES, GUESTS, VISITOR_HANDSHAKES, VISITORS
from tunnel.core.certificates import Certificates, for_agents, for_visitors
from tunnel.core.door import Door
from tunnel.core.draining import finish
from tunnel.core.exchange import Exchanger
from tunnel.core.figures import links_of
from tunnel.core.first import FirstToken, ensure_default, leave_invitation
from tunnel.core.forwarding import Forwarding
from tunnel.core.gate import Gate
from tunnel.core.inherited import AGENTS, HTTP, PUBLIC, inherit
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.issuing.issuer import Issuer
from tunnel.core.issuing.making import CERTIFICATES, make_issuer, place_for
from tunnel.core.limits import no_refusals
from tunnel.core.outside import Outside
from tunnel.core.ownpages import OwnPages
from tunnel.core.parts import make_exchanger, make_plain_side
from tunnel.core.ports import OwnPorts, PortSource
from tunnel.core.probing import Prober
from tunnel.core.proxied import ProxyHeaders
from tunnel.core.quick import Quick
from tunnel.core.quotas import default_limits
from tunnel.core.recent import Recent
from tunnel.core.registry import Registry
from tunnel.core.reports import Reports
from tunnel.core.shared import Common
from tunnel.core.siblings import SiblingPorts, SiblingRows, Siblings
from tunnel.core.starting import FORGET_INTERVAL, Address, announce, check_settings, handed_to
from tunnel.core.status import Said, said_by, status_page
from tunnel.core.store import Store
from tunnel.core.storing import LAST_WRITES, LEAST_WRITES, hurry, opened
from tunnel.core.tcp import Ports
from tunnel.core.upgrade import Predecessor, Successor, UpgradeError
from tunnel.handler import CoreStatistics, Layer, RequestVisit
from tunnel.interrupts import ADVICE
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import address_text
from tunnel.plugins import Program
from tunnel.ready import make_ready
from tunnel.wire.held import Held
from tunnel.workers.member import Member

log = get_logger("tunnel.core")


class Core:
    """A core with these settings. Once `run` has started the addresses, `token_file` and `fingerprint` are known.

    on_request hears of each request that ended. member: where this is one of several workers; what they do once for all
    (first start, pages, the announcement) is their supervisor's then. Raises ConfigError for settings that can't work.
    """

    def __init__(self, settings: CoreSettings, member: Member | None = None) -> None:
        check_settings(settings)
        self.settings = settings
        self.data_dir: Path = data_dir(settings)
        self.public_address: Address = ("", 0)
        self.http_address: Address | None = None
        self.agent_address: Address = ("", 0)
        self.token_file: Path | None = None
        self.fingerprint = ""
        self.is_orphan = False  # the successor of an upgrade has died after it had taken the agents' port
        self.on_request: Callable[[RequestVisit], None] | None = None
        self.registry = Registry(settings.base_domain, settings.name_hold)
        self.reports = Reports()
        self._refusals = no_refusals()
        self._draining = trio.Event()
        self._inherited = inherit(os.environ) if member is None else handed_to(member)
        self._member = member
        self._siblings = None if member is None else Siblings(member, self.registry, member.orders["count"])
        self._common = Common(settings, self._siblings)
        self._held = Held(self._common.part(settings.max_buffer), monotonic)
        self._is_handed_over = False  # a successor goes on: agents are with it, kept connections have a moment
        self._told = trio.Event()  # the supervisor wants no more to be accepted
        self._is_closed = trio.Event()  # nothing is accepted any more
        self._listeners: dict[str, list[socket.socket]] = {}  # by the names of tunnel.core.inherited
        self._until_upgrade: list[trio.CancelScope] = []  # around what takes agents
        self._pages = OwnPages(settings, self.data_dir, self._inherited)
        self._ports: Ports | None = None
        self._successor: Successor | None = None
        self._listening = False
        self._sweeper = Sweeper(lambda exc: log.error("a deadline check broke", error=exc))
        self._ready = make_ready(lambda exc: log.error("a socket's function broke", error=exc))
        self._certificates: list[Certificates] = []
        self._issuer: Issuer | None = None
        self._program = Program("core", sections(settings), self.statistics, self._take_round_trips, self.reports.all)
        self._prober = Prober(self.registry, settings.heartbeat_timeout)
        self._program.set_details("tunnels", self._prober.details)
        self._program.offer("core", lambda: msgspec.msgpack.encode(said_by(self, member.number if member else 0)))
        if member is not None:
            member.program = self._program
        self._accounts: Accounts | None = None
        self._exchanger: Exchanger | None = None
        self._gate: Gate | None = None
        self._outside = Outside(settings, self.registry)

    # What others may ask --------------------------------------------------------------------------------------

    def statistics(self) -> CoreStatistics:
        accounts, exchanger = self._accounts, self._exchanger
        dropped = self._program.details().get("logs", {}).get("dropped", 0)
        return CoreStatistics(
            self.settings.max_connections,
            exchanger.bytes_in if exchanger else 0,
            exchanger.bytes_out if exchanger else 0,
            links_of(self.registry, self._member.number if self._member is not None else 0),
            accounts.quotas() if accounts else [],
            dict(accounts.exceeded) if accounts else {},
            dropped,
            {one.listener: one.expiry for one in self._certificates if one.expiry is not None},
            {**self._refusals, "buffer": self._refusals["buffer"] + self._held.refused},
            self._gate.links.protocol_errors if self._gate else 0,
            self._held.bytes,
            self._common.part(self.settings.max_buffer) or math.inf,
            dict(self._issuer.results) if self._issuer else {},
            self._issuer.failing if self._issuer else 0,
        )

    def _take_round_trips(self) -> list[float]:
        return self._gate.links.take_round_trips() if self._gate else []

    @property
    def metrics_address(self) -> Address | None:
        return self._pages.metrics

    @property
    def dashboard_address(self) -> Address | None:
        return self._pages.dashboard

    async def say(self) -> Said:
        return said_by(self)

    def recent(self) -> Recent:
        """How requests ended."""
        return self._exchanger.recent.say() if self._exchanger is not None else Recent()

    def _check_draining(self) -> tuple[bool, str]:
        return (False, "shutting down") if self._draining.is_set() else (True, "serving")

    def _check_listeners(self) -> tuple[bool, str]:
        if self._listening:
            public, agents = address_text(self.public_address), address_text(self.agent_address)
            return True, f"visitors on {public}, agents on {agents}"
        return False, "not listening"

    # Life -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Begin to shut down: `/readyz` says so at once; `run` returns when all accepted requests are answered."""
        if self._successor is not None and not self._draining.is_set():
            self._successor.end()  # it was not to follow us, but to stop with us
            self._successor = None
        self._draining.set()

    async def upgrade(self) -> int:
        """Let a new process take over, as tunnel/core/upgrade.py says, and begin to shut down. Returns its process id.

        Raises UpgradeError; then this core goes on.
        """
        if self._successor is not None or self._draining.is_set() or self._gate is None or self._ports is None:
            raise UpgradeError("this core is starting, shutting down, or has a successor already")
        successor = self._successor = Successor({**self._listeners, **self._pages.sockets, **self._ports.sockets()})
        log.info("upgrade: successor started", pid=successor.pid)
        try:
            await successor.wait_ready()
        except BaseException:
            self._successor = None
            raise
        self._pages.stop()
        self.stop_taking_agents()
        names = self.registry.names_in_use()
        self._gate.links.send_away("the core is being upgraded")
        self.is_orphan = not await successor.wait_moved(names)
        if self.is_orphan:
            log.error("upgrade broke off, this core ends too", error="the successor ended after it had taken the ports")
        self._is_handed_over = True
        self._draining.set()
        return successor.pid

    # In a worker, the same step by step, as the supervisor says

    def stop_taking_agents(self) -> None:
        for scope in self._until_upgrade:
            scope.cancel()

    def send_agents_away(self) -> None:
        if self._gate is not None:
            self._gate.links.send_away("the core is being upgraded")

    async def close(self, is_handed_over: bool) -> None:
        """Begin to shut down; returns when nothing is accepted any more."""
        self._is_handed_over = is_handed_over
        self._told.set()
        self._draining.set()
        await self._is_closed.wait()

    async def reload(self) -> None:
        """Read the certificates again; links and visitors that are there keep theirs."""
        for certificates in self._certificates:
            await certificates.reload()
            if certificates.listener == "agent":
                self.fingerprint = certificates.fingerprint

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until drained. Raises ConfigError when an address, certificate, store or plug-in can't be used, and
        StoreError when the store stays away."""
        async with open_pair() as background:
            async with (
                self._program.plugged_in(self.settings.layers, background) as layers,
                opened(self.settings, self.data_dir, layers, self._draining, self._write_last) as store,
            ):
                if store is None:
                    task_status.started()
                else:
                    await self._serve(background, layers, store, task_status)
            background.cancel_scope.cancel()

    async def _write_last(self) -> None:
        if self._accounts is not None:
            await self._accounts.flush_last()

    async def _serve(
        self, background: trio.Nursery, layers: Sequence[Layer], store: Store, task_status: trio.TaskStatus[None]
    ) -> None:
        settings, siblings = self.settings, self._siblings
        first = await ensure_default(store, self.data_dir) if siblings is None else None
        accounts = self._accounts = Accounts(
            store,
            jwt_secret=settings.jwt_secret,
            jwt_public_key=settings.jwt_public_key,
            defaults=default_limits(
                settings.max_connections,
                settings.max_connections_per_account,
                settings.max_names_per_account,
                settings.max_ports_per_account,
            ),
            domain=self.registry.domain,
            name_hold=settings.name_hold,
            rows=SiblingRows(siblings) if siblings is not None else None,
        )
        accounts.set_names_in_use(self.registry.names_in_use)
        accounts.names_known = self.registry.known_names
        acme = place_for(settings, self.data_dir)
        is_said = siblings is not None  # by the supervisor
        agent_tls = for_agents(settings, self.data_dir, is_said=is_said)
        public_tls = for_visitors(settings, acme / CERTIFICATES if acme is not None else None, is_said=is_said)
        challenges: Challenges | None = None
        if acme is not None and public_tls is not None:
            self._issuer, challenges = make_issuer(
                settings, acme, public_tls, self.registry, accounts, siblings.names if siblings is not None else {}
            )
        self._certificates = [one for one in (agent_tls, public_tls) if one is not None]
        self.fingerprint = agent_tls.fingerprint if agent_tls is not None else ""
        if settings.invite_dir and siblings is None:
            leave_invitation(Path(settings.invite_dir), self.data_dir / "default.token", self.fingerprint)
        public_host, public_port = parse_address(settings.public_addr)
        inherited = self._inherited
        public = inherited.listen(PUBLIC, (public_host, public_port), "-public-addr")
        agents = inherited.listen(AGENTS, parse_address(settings.agent_addr), "-agent-addr")
        self._listeners.update({PUBLIC: public, AGENTS: agents})
        plain = inherited.listen(HTTP, parse_address(settings.http_addr), "-http-addr") if settings.http_addr else []
        if plain:
            self._listeners[HTTP] = plain
            self.http_address = plain[0].getsockname()[:2]
        self.public_address, self.agent_address = public[0].getsockname()[:2], agents[0].getsockname()[:2]
        self._outside.listening_port = self.public_address[1]
        forwarding = Forwarding(settings.trusted_proxies, guests=self._common.shares(GUESTS, 0))
        exchanger = self._exchanger = make_exchanger(
            settings, self.registry, accounts, layers, forwarding, self._refusals, self._held
        )
        exchanger.on_finished = self.on_request
        exchanger.elsewhere = siblings
        find = challenges.find if challenges is not None else None
        plain_side = make_plain_side(settings, forwarding, self._refusals, self._outside.port, find)
        proxies = ProxyHeaders(settings.proxy_protocol)
        shares = self._common.shares(VISITORS, settings.max_visitors)
        rates = [self._common.rate(kind) for kind in (AGENT_HANDSHAKES, VISITOR_HANDSHAKES)]
        make_door = partial(
            Door,
            sweeper=self._sweeper,
            proxies=proxies,
            handshake_timeout=settings.head_timeout,
            keepalive_timeout=settings.keepalive_timeout,
            shares=shares,
            rate=rates[1],
        )
        quick: Quick | None = None
        if self._ready is not None:
            background.start_soon(self._ready.run)
            if exchanger.observers is not None:
                exchanger.observers.when_idle = self._ready.when_idle
                quick = Quick(exchanger, exchanger.observers, self._ready, settings.keepalive_timeout)
        door = make_door(exchanger, tls=public_tls, quick=quick)
        plain_door = make_door(plain_side, tls=None)
        background.start_soon(self._sweeper.run)
        background.start_soon(self._forget_names)
        background.start_soon(self._prober.run)
        background.start_soon(hurry, store)
        self._program.checks.update(
            listeners=self._check_listeners, store=accounts.is_ready, draining=self._check_draining
        )
        async with open_pair() as handlers:
            source: PortSource = (
                OwnPorts(public_host, parse_ports(settings.tcp_ports), inherited)
                if siblings is None
                else SiblingPorts(siblings)
            )
            ports = self._ports = Ports(
                source, self.registry, exchanger, layers, handlers, settings.request_timeout, proxies, shares, siblings
            )
            accounts.ports_open = ports.by_account
            gate = self._gate = Gate(
                self.registry,
                accounts,
                ports,
                self.reports,
                self._sweeper,
                layers,
                self._outside.url_of,
                tls=agent_tls,
                max_connections=settings.max_connections,
                max_streams=settings.max_streams,
                address_share=settings.address_share,
                auth_timeout=settings.auth_timeout,
                heartbeat=settings.heartbeat,
                heartbeat_timeout=settings.heartbeat_timeout,
                refusals=self._refusals,
                max_attaching=self._common.part(settings.max_attaching),
                rate=rates[0],
                held=self._held,
                ready=self._ready,
                stream_window=settings.stream_window,
                link_window=settings.link_window,
                max_link_queue=settings.max_link_queue or math.inf,
                siblings=siblings,
                drain_timeout=settings.drain_timeout,
            )
            await background.start(accounts.run, gate.links.recheck)
            if self._member is None:
                self._pages.start(background, self._program.pages, status_page(self))
            if siblings is not None and self._member is not None:
                siblings.receive(self._member, door, gate, ports, handlers)
            async with open_pair() as accepting:
                for listener in agents:
                    accepting.start_soon(self._take_agents, gate, listener, handlers)
                if inherited.channel is not None:
                    await Predecessor(inherited.channel).follow(self.registry.names_in_use)
                if self._member is not None:
                    await self._wait_turn(self._member)
                for listener in public:
                    accepting.start_soon(door.accept, listener, handlers)
                for listener in plain:
                    accepting.start_soon(plain_door.accept, listener, handlers)
                if self._issuer is not None:
                    background.start_soon(self._issuer.run)
                self._listening = True
                if siblings is None:
                    self._announce(first)
                task_status.started()
                await self._draining.wait()
                if not self._told.is_set():  # else the supervisor has waited
                    delay = 0.0 if self._is_handed_over else settings.drain_delay
                    told = {"delay": f"{delay:g}s", "timeout": f"{settings.drain_timeout:g}s"}
                    log.info("draining", **told, under_way=exchanger.active, advice=ADVICE)
                    with trio.move_on_after(delay):
                        await self._told.wait()
                self._listening = False
                ports.close_all()
                accepting.cancel_scope.cancel()
            self._is_closed.set()
            if self._successor is not None:
                await self._successor.go()
            began = trio.current_time()
            await finish(
                exchanger, door, gate, self.registry, settings.drain_timeout, is_handed_over=self._is_handed_over
            )
            left = began + settings.drain_timeout - trio.current_time()
            store.end_by(trio.current_time() + min(LAST_WRITES, max(LEAST_WRITES, left)))
            plain_door.close_idle()
            handlers.cancel_scope.cancel()
        self._program.settle()  # so that this is the log's last line
        if siblings is None:
            log.info("stopped")
        else:
            log.debug("worker stopped")

    async def _wait_turn(self, member: Member) -> None:
        """Say that agents are taken here, and wait for the word to take visitors, or for the end."""
        async with open_pair() as nursery:

            async def wait_end() -> None:
                await self._draining.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_end)
            await member.channel.call("ready", {"fingerprint": self.fingerprint})
            nursery.cancel_scope.cancel()

    async def _take_agents(self, gate: Gate, listener: socket.socket, handlers: trio.Nursery) -> None:
        with trio.CancelScope() as scope:
            self._until_upgrade.append(scope)
            await gate.accept(listener, handlers)

    async def _forget_names(self) -> None:
        while True:
            await trio.sleep(FORGET_INTERVAL)
            for tunnel in self.registry.forget_expired():
                if self._siblings is None:
                    log.info("name is free again", tunnel=tunnel.name)

    def _announce(self, first: FirstToken | None) -> None:
        self.token_file = first.path if first is not None else self.data_dir / "default.token"
        announce(
            self.settings,
            first,
            public=self.public_address,
            agents=self.agent_address,
            metrics=self.metrics_address,
            dashboard=self.dashboard_address,
            fingerprint=self.fingerprint,
            plain=self.http_address,
        )

    def details(self) -> dict[str, dict[str, Any]]:
        return self._program.details()

    def readiness(self) -> dict[str, dict[str, Any]]:
        return self._program.readiness()
