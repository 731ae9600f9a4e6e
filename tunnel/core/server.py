"""The core: its parts, the order in which they start, and how they end.

Nurseries, from outside in: `background` (sweeper, watcher, pages), `handlers` (agents' and visitors' connections),
`accepting` (the listeners). A drain cancels the inner one at once and puts a deadline on the middle one. So does an
upgrade (tunnel/core/upgrade.py), after a successor has started with the same sockets and got the agents.
"""

from __future__ import annotations

import math
import os
import socket
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any

import msgspec
import trio

from tunnel.config import CoreSettings, data_dir, parse_address, parse_ports, sections
from tunnel.core.accounts import Accounts
from tunnel.core.board import AGENT_HANDSHAKES, GUESTS, VISITOR_HANDSHAKES, VISITORS
from tunnel.core.certificates import Certificates, for_agents, for_visitors
from tunnel.core.door import Door
from tunnel.core.exchange import Exchanger
from tunnel.core.first import FirstToken, agent_command, ensure_default, leave_invitation
from tunnel.core.forwarding import Forwarding
from tunnel.core.gate import Gate
from tunnel.core.inherited import AGENTS, HTTP, PUBLIC, Inherited, adopt, inherit
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.issuing.issuer import Issuer
from tunnel.core.issuing.making import CERTIFICATES, make_issuer, place_for
from tunnel.core.limits import Rate, Shares, no_refusals
from tunnel.core.ownpages import OwnPages
from tunnel.core.plain import PlainSide
from tunnel.core.ports import OwnPorts, PortSource
from tunnel.core.private import make_private
from tunnel.core.probing import Prober
from tunnel.core.proxied import ProxyHeaders
from tunnel.core.quick import Quick
from tunnel.core.quotas import default_limits
from tunnel.core.recent import Recent
from tunnel.core.registry import Registry, Tunnel
from tunnel.core.reports import Reports
from tunnel.core.shared import SharedRate, SharedShares
from tunnel.core.siblings import SiblingPorts, SiblingRows, Siblings
from tunnel.core.status import Said, said_by, status_page
from tunnel.core.store import Store, StoreError
from tunnel.core.tcp import Ports
from tunnel.core.upgrade import KEEP_SECONDS, Predecessor, Successor, UpgradeError
from tunnel.errors import ConfigError
from tunnel.handler import CoreStatistics, Layer, LinkStatistics, RequestVisit
from tunnel.interrupts import ADVICE, say_drain
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import address_text
from tunnel.plugins import Program
from tunnel.ready import make_ready
from tunnel.wire.frames import MOST_WINDOW
from tunnel.wire.held import Held
from tunnel.workers.member import Member

log = get_logger("tunnel.core")

MAX_HEAD = 96 * 1024  #: the largest -max-head: with our own fields it must fit wire.frames.MAX_HEAD
DRAIN_POLL = 0.02  #: seconds
CUT_OFF_TIME = 0.5  #: seconds that requests have to be answered with "draining" at the deadline
STORE_PAUSE = 2.0  #: seconds between tries to open the store
LAST_WRITES = 3.0  #: seconds that the store has at most for what is written last, within the drain's time
LEAST_WRITES = 1.0  #: and at least, also beyond it, or after a second signal
FORGET_INTERVAL = 10.0  #: seconds between looks for names whose hold is over

Address = tuple[str, int]


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
        self._inherited = inherit(os.environ) if member is None else _handed(member)
        self._member = member
        self._siblings = None if member is None else Siblings(member, self.registry, member.orders["count"])
        self._held = Held(self._part(settings.max_buffer), monotonic)
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
        self._public_url = urllib.parse.urlsplit(settings.public_url)

    # What others may ask --------------------------------------------------------------------------------------

    def statistics(self) -> CoreStatistics:
        accounts, exchanger = self._accounts, self._exchanger
        links = []
        for agent in self.registry.links.values():
            session, visit = agent.link.session, agent.visit
            links.append(
                LinkStatistics(
                    visit.connection_id,
                    visit.agent_id,
                    visit.account_id,
                    visit.state,
                    len(session.streams),
                    session.frames_in,
                    session.frames_out,
                    session.frames_bad,
                    session.queued_bytes,
                    agent.link.rtt,
                    agent.link.offset,
                    sum(stream.receivable <= 0 for stream in session.streams.values()),
                    sum(stream.credit <= 0 for stream in session.streams.values()),
                    agent.instance,
                    self._member.number if self._member is not None else 0,
                    visit.remote,
                    round(time() - monotonic() + visit.started, 1),
                )
            )
        dropped = self._program.details().get("logs", {}).get("dropped", 0)
        return CoreStatistics(
            self.settings.max_connections,
            exchanger.bytes_in if exchanger else 0,
            exchanger.bytes_out if exchanger else 0,
            links,
            accounts.quotas() if accounts else [],
            dict(accounts.exceeded) if accounts else {},
            dropped,
            {one.listener: one.expiry for one in self._certificates if one.expiry is not None},
            {**self._refusals, "buffer": self._refusals["buffer"] + self._held.refused},
            self._gate.links.protocol_errors if self._gate else 0,
            self._held.bytes,
            self._part(self.settings.max_buffer) or math.inf,
            dict(self._issuer.results) if self._issuer else {},
            self._issuer.failing if self._issuer else 0,
        )

    def _take_round_trips(self) -> list[float]:
        return self._gate.links.take_round_trips() if self._gate else []

    def url_of(self, tunnel: Tunnel) -> str:
        """What visitors type for a tunnel."""
        if tunnel.protocol == "tcp":
            return f"tcp://{self.settings.base_domain}:{tunnel.port}"
        scheme = self._public_url.scheme or ("https" if self.settings.public_tls else "http")
        default = 443 if scheme == "https" else 80
        port = self._outside_port(default)
        suffix = f":{port}" if port != default else ""
        return f"{scheme}://{self.registry.domain.host_of(tunnel.name)}{suffix}"

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

    def _outside_port(self, default: int = 443) -> int:
        """The port that visitors type."""
        return (self._public_url.port if self._public_url.scheme else self.public_address[1]) or default

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
                self._opened_store(layers) as store,
            ):
                if store is None:
                    task_status.started()
                else:
                    await self._serve(background, layers, store, task_status)
            background.cancel_scope.cancel()

    @asynccontextmanager
    async def _opened_store(self, layers: Sequence[Layer]) -> AsyncIterator[Store | None]:
        """None when a drain began while it was away."""
        try:
            make_private(self.data_dir)
        except OSError as exc:
            raise ConfigError(f"-data-dir: can't make {self.data_dir} ({exc.strerror}); give another one") from exc
        store = Store(self.settings.database.url, self.data_dir, layers)
        if not await reach(store, self.settings.database.wait, self._draining):
            yield None
            return
        try:
            yield store
        finally:
            store.end_by(trio.current_time() + LAST_WRITES)
            with trio.CancelScope(shield=True):
                if self._accounts is not None:
                    await self._accounts.flush_last()
                with trio.move_on_after(1):
                    await store.close()

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
        agent_tls = for_agents(settings, self.data_dir)
        public_tls = for_visitors(settings, acme / CERTIFICATES if acme is not None else None)
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
        exchanger = self._exchanger = Exchanger(
            self.registry,
            accounts,
            layers,
            Forwarding(settings.trusted_proxies, guests=self._shares(GUESTS, 0)),
            max_head=settings.max_head,
            max_target=settings.max_target,
            max_body=settings.max_body,
            head_timeout=settings.head_timeout,
            request_timeout=settings.request_timeout,
            body_idle_timeout=settings.body_idle_timeout,
            server_timing=settings.tracing.server_timing,
            max_fields=settings.max_fields,
            max_requests=settings.max_requests,
            refusals=self._refusals,
            held=self._held,
        )
        exchanger.on_finished = self.on_request
        exchanger.elsewhere = siblings
        plain_side = PlainSide(
            exchanger.forwarding,
            self._refusals,
            outside_port=self._outside_port,
            find=challenges.find if challenges is not None else None,
            max_head=settings.max_head,
            max_target=settings.max_target,
            max_fields=settings.max_fields,
            head_timeout=settings.head_timeout,
        )
        proxies = ProxyHeaders(settings.proxy_protocol)
        shares = self._shares(VISITORS, settings.max_visitors)
        rates = [self._rate(kind) for kind in (AGENT_HANDSHAKES, VISITOR_HANDSHAKES)]
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
                self.url_of,
                tls=agent_tls,
                max_connections=settings.max_connections,
                max_streams=settings.max_streams,
                address_share=settings.address_share,
                auth_timeout=settings.auth_timeout,
                heartbeat=settings.heartbeat,
                heartbeat_timeout=settings.heartbeat_timeout,
                refusals=self._refusals,
                max_attaching=self._part(settings.max_attaching),
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
            await self._finish(exchanger, door, gate)
            left = began + settings.drain_timeout - trio.current_time()
            store.end_by(trio.current_time() + min(LAST_WRITES, max(LEAST_WRITES, left)))
            plain_door.close_idle()
            handlers.cancel_scope.cancel()
        self._program.settle()  # so that this is the log's last line
        if siblings is None:
            log.info("stopped")
        else:
            log.debug("worker stopped")

    # What several workers count together

    def _part(self, limit: int) -> int:
        """Of a limit on this process' memory, its part."""
        return limit if self._siblings is None else -(-limit // self._siblings.count)

    def _shares(self, kind: int, most: int) -> Shares:
        most_each = self.settings.max_visitors_per_address
        if self._siblings is None:
            return Shares(most, most_each)
        return SharedShares(most, most_each, self._siblings.board, kind)

    def _rate(self, kind: int) -> Rate:
        most = self.settings.max_handshakes
        return Rate(most) if self._siblings is None else SharedRate(most, self._siblings.board, kind)

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

    async def _finish(self, exchanger: Exchanger, door: Door, gate: Gate) -> None:
        """Let every accepted request finish, within the deadline."""
        exchanger.is_draining = True
        if not self._is_handed_over:
            gate.links.send_away("the core is shutting down")
        keep = KEEP_SECONDS if self._is_handed_over else 0.0
        timeout = self.settings.drain_timeout
        async with open_pair() as nursery:
            nursery.start_soon(say_drain, log, lambda: exchanger.active, timeout)
            with trio.move_on_after(timeout) as scope:
                while True:
                    waiting = door.close_idle(keep)
                    if not waiting and not exchanger.active:
                        break
                    await trio.sleep(DRAIN_POLL)
            nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            log.warning("drain deadline reached", requests=exchanger.active)
            door.cut_off()
            with trio.move_on_after(CUT_OFF_TIME):
                await exchanger.wait_idle()
        door.close_idle()
        gate.links.close_all("the core is shutting down")
        with trio.move_on_after(1):
            for agent in list(self.registry.links.values()):
                await agent.link.ended.wait()

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


def announce(
    settings: CoreSettings,
    first: FirstToken | None,
    *,
    public: Address,
    agents: Address,
    metrics: Address | None,
    dashboard: Address | None,
    fingerprint: str,
    plain: Address | None = None,
    **more: Any,
) -> None:
    """Say where all of it is; until an agent has come also the whole command that connects one, to be pasted. The token
    stays in its file."""

    def url(address: Address | None, path: str = "") -> str:
        return f"http://{address_text(address)}{path}" if address else "off"

    log.info(
        "core ready",
        public=address_text(public),
        agents=address_text(agents),
        **({"http": url(plain)} if plain else {}),
        metrics=url(metrics, "/metrics"),
        status=url(dashboard),
        fingerprint=fingerprint or "none (no TLS on the agents' links)",
        **more,
    )
    if first is not None:
        command = agent_command(f"{settings.base_domain}:{agents[1]}", first.path, fingerprint)
        why = "first start" if first.is_new else "no agent has come yet"
        log.info(f"{why}: connect an agent with this command", command=command)


async def reach(store: Store, seconds: float, draining: trio.Event) -> bool:
    """Open it. One that is away gets a while: a database may start later than we do. False: a drain began."""
    until = trio.current_time() + seconds
    while not draining.is_set():
        try:
            await store.open()
            return True
        except StoreError as exc:
            left = until - trio.current_time()
            if left <= 0:
                raise
            log.warning("the store is away, trying again", cause=str(exc), left=f"{left:.0f}s")
            with trio.move_on_after(min(left, STORE_PAUSE)):
                await draining.wait()
    return False


async def hurry(store: Store) -> None:
    """When all is cancelled, as by a second signal, what the store still writes has a moment."""
    try:
        await trio.sleep_forever()
    finally:
        store.end_by(trio.current_time() + LEAST_WRITES)


def check_settings(settings: CoreSettings) -> None:
    """What no single setting shows. Raises ConfigError."""
    if settings.max_head > MAX_HEAD:
        raise ConfigError(f"-max-head: at most {MAX_HEAD} bytes, the link carries no larger head")
    if not settings.stream_window <= settings.link_window <= MOST_WINDOW:
        raise ConfigError("-link-window: at least -stream-window, and less than 2 GiB")


def _handed(member: Member) -> Inherited:
    """The listening sockets that a worker is given with its orders."""
    numbers = iter(member.files)
    return Inherited({name: [adopt(next(numbers)) for _ in range(count)] for name, count in member.orders["sockets"]})
