"""The agent's life: dial, authenticate, serve, and again when the link is gone.

Attempt after attempt until told to stop: (1) dial, (2) TLS and the pin, (3) WebSocket, (4) hello and welcome,
(5) serve streams until the link ends. What goes wrong decides the next wait (tunnel/agent/backoff.py); refused
credentials end the program, since no retry mends them. A core that sends its agents away is dialled again at once,
while the old link goes on with what it has: another core, or the next release of this one, may be there already.

To a core of several workers the agent keeps a link to each (tunnel/agent/slots.py), all of them in this way.
"""

from __future__ import annotations

import secrets
import socket as stdlib_socket
import ssl
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic

import msgspec
import trio
import trio_websocket

from tunnel import __version__
from tunnel.agent import dialing
from tunnel.agent.farewell import give_up, leave_oldest, see_off
from tunnel.agent.forward import Forwarder
from tunnel.agent.pages import listen_for_pages
from tunnel.agent.probing import LocalProber
from tunnel.agent.quick import Quick, UnderWay
from tunnel.agent.racing import Race, Try
from tunnel.agent.served import ServedStream
from tunnel.agent.slots import Slot, Slots
from tunnel.agent.telling import Telling
from tunnel.config import AgentSettings, parse_address, parse_local, sections
from tunnel.errors import SLOW_REFUSALS, ConfigError, Refused, TunnelError, WireError
from tunnel.handler import AgentStatistics, ConnectVisit, Handler, Layer, LinkVisit, wrap
from tunnel.http.client import Service
from tunnel.http.pages import serve_pages
from tunnel.interrupts import say_drain
from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.link.stream import Stream
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.link.workers import Cancellable, Workers
from tunnel.log import get_logger
from tunnel.net import Socket, address_text
from tunnel.plugins import Program
from tunnel.ready import make_ready
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, RefusedMessage, TunnelRequest, Welcome
from tunnel.wire.held import Held
from tunnel.workers.member import Member

log = get_logger("tunnel.agent")

MAX_STREAMS = 1000  #: open requests on the link that this agent takes
SILENCE = 2.0  #: seconds for a core's WebSocket to answer a ping before the welcome, and half a second between two
CONNECT_TIMEOUT = 10.0  #: seconds from dialling to the welcome

_Reached = tuple[transport.Transport, dict[str, float]]  # a WebSocket to the core, and when its parts were there


class Stopped(TunnelError):
    """The agent gives up: its text is the one line for the user, exit code 1.

    reason: the core's word of REFUSALS, or "max_retries".
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A tunnel in service. url: what visitors type; local: what it forwards to."""

    name: str
    url: str
    local: str


class _Attempt:
    """A link from dialling to its end. over: the next one is due `wait` seconds from now; failed: it never came up.
    number: from 1, since the slot's last link; is_told: what is said of it is no repetition. is_surplus: it has come to
    a worker of the core that has one of ours already, and is given up."""

    __slots__ = (
        "connected",
        "core",
        "core_drain",
        "failed",
        "is_surplus",
        "is_told",
        "link",
        "number",
        "over",
        "quick",
        "slot",
        "traced",
        "wait",
        "was_up",
        "went_away",
        "workers",
    )

    def __init__(self, slot: Slot, number: int) -> None:
        self.slot = slot
        self.number = number
        self.is_told = number == 1
        self.link: Link
        self.traced: dict[str, str] = {}  # of its span, for the log
        self.core = ""  # the run of the core that welcomed it
        self.core_drain = 0.0  # seconds that the core's last requests get
        self.workers: Workers[Stream | ServedStream] | None = None
        self.quick: Quick | None = None
        self.connected = False
        self.was_up = self.went_away = self.is_surplus = False
        self.failed = False
        self.wait = 0.0
        self.over = trio.Event()

    def settle(self, wait: float, *, failed: bool = False) -> None:
        if not self.over.is_set():
            self.wait, self.failed = wait, failed
            self.over.set()


class _Connect(ConnectVisit, kw_only=True):
    """An attempt to get a link up, and what came of it."""

    nursery: trio.Nursery
    attempt: _Attempt
    link: Link
    slot: Slot
    welcome: Welcome | None = None


class _Attached(LinkVisit, kw_only=True):
    attempt: _Attempt


class Agent:
    """An agent with these settings. After `run` has started: `tunnels`, `metrics_address`.

    member: where this is one of several workers; pages and reports are their supervisor's then. Raises ConfigError for
    settings that can't work.
    """

    def __init__(self, settings: AgentSettings, member: Member | None = None) -> None:
        self.settings = settings
        self._member = member
        self.agent_id = settings.agent_id or default_agent_id()
        self.locals = parse_local(settings.local, settings.subdomain)
        self.services = [
            Service(one.host, one.port, one.scheme == "https", settings.host_header) for one in self.locals
        ]
        self.tunnels: list[Tunnel] = []
        self.metrics_address: tuple[str, int] | None = None
        #: by the worker of the core that is asked for
        self._tls: dict[int | None, ssl.SSLContext | None] = {None: dialing.tls_context(settings)}
        self._slots = Slots()
        self._instance: str = member.orders["instance"] if member is not None else secrets.token_hex(8)
        self._process = member.number if member is not None else 0  # of those that are one agent together
        self._attempts: list[_Attempt] = []  # the newest last; those before it have been sent away
        most = -(-settings.max_buffer // settings.workers)  # each has its part
        self._held = Held(most, monotonic)
        self._most_window = min(max(most // 4, frames.LEAST_WINDOW), frames.MOST_WINDOW) if most else frames.MOST_WINDOW
        self._draining = False
        self._stopping = trio.Event()
        self._telling = Telling()
        self._counts = AgentStatistics(self.agent_id, False, 0, 0, 0, 0, 0, 0, 0, 0)
        self._round_trips: list[float] = []
        self._sweeper = Sweeper(lambda exc: log.error("a deadline check broke", error=exc))
        self._under_way: UnderWay = {}
        self._ready = make_ready(lambda exc: log.error("a socket's function broke", error=exc))
        self._program = Program("agent", sections(settings), self.statistics, self._take_round_trips)
        self._program.checks["link"] = self._check_link
        self._prober = LocalProber(self.services)
        self._program.set_details("local_services", self._prober.details)
        self._program.offer("agent", self._say)
        if member is not None:
            member.program = self._program
        self._on_up: trio.TaskStatus[None] | None = None
        self._forwarder: Forwarder | None = None
        self._keeping: trio.Nursery | None = None
        self._handle_connect: Handler = self._connect
        self._handle_link: Handler = self._attached

    # What others may ask --------------------------------------------------------------------------------------

    @property
    def _connected(self) -> bool:
        return any(attempt.connected for attempt in self._attempts)

    def _is_served(self, slot: Slot, core: str | None = None) -> bool:
        """core: the run of the core that the link has to be at; None for any."""
        return any(
            one.slot is slot and one.connected and not one.went_away and core in (None, one.core)
            for one in self._attempts
        )

    def statistics(self) -> AgentStatistics:
        """Counts since the start, those of the present links included."""
        counts = self._counts
        links = [attempt.link for attempt in self._attempts]
        return AgentStatistics(
            self.agent_id,
            self._connected,
            counts.reconnections,
            counts.reconnection_errors,
            counts.consecutive_errors,
            counts.frames_received + sum(link.session.frames_in for link in links),
            counts.frames_sent + sum(link.session.frames_out for link in links),
            counts.frames_error + sum(link.session.frames_bad for link in links),
            counts.heartbeats_sent + sum(link.heartbeats_sent for link in links),
            counts.heartbeats_failed + sum(link.heartbeats_failed for link in links),
            self._program.details().get("logs", {}).get("dropped", 0),
        )

    def _say(self) -> bytes:
        checks = self._program.readiness()
        said = {"statistics": self.statistics(), "checks": checks, "details": self._program.details()}
        return msgspec.msgpack.encode(said)

    def _take_round_trips(self) -> list[float]:
        taken, self._round_trips = self._round_trips, []
        for attempt in self._attempts:
            taken += attempt.link.round_trips
            attempt.link.round_trips.clear()
        return taken

    def _check_link(self) -> tuple[bool, str]:
        if self._draining:
            return False, "shutting down"
        if self._connected:
            slots = self._slots.all
            up = sum(self._is_served(slot) for slot in slots)
            links = f", {up} of {len(slots)} links" if len(slots) > 1 else ""
            return True, f"connected to {self.settings.server}{links}"
        return False, f"no link to {self.settings.server}"

    # Running --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop gracefully: open requests get `drain_timeout` to finish, then `run` returns."""
        self._draining = True
        self._stopping.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped; started once the first link is up.

        Raises Stopped (refused credentials, retries used up) and ConfigError (metrics address, plug-ins).
        """
        self._on_up = task_status
        async with open_pair() as nursery:
            async with self._program.plugged_in(self.settings.layers, nursery) as layers:
                await self._start(nursery, layers)
                async with open_pair() as working:
                    working.start_soon(self._watch_stop, working)
                    async with open_pair() as self._keeping:
                        await self._keep(self._slots.all[0])
                    working.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery, layers: Sequence[Layer]) -> None:
        self._forwarder = Forwarder(layers, self._sweeper, self.settings.request_timeout)
        self._handle_connect = wrap(self._connect, layers)
        self._handle_link = wrap(self._attached, layers)
        for service in self.services:
            self._sweeper.add(service)
        nursery.start_soon(self._sweeper.run)
        if self._ready is not None:
            nursery.start_soon(self._ready.run)
            if self._forwarder.observers is not None:
                self._forwarder.observers.when_idle = self._ready.when_idle
        nursery.start_soon(self._prober.run)
        if self.settings.metrics_addr and self._member is None:
            sockets = listen_for_pages(self.settings)
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in sockets]
            self.metrics_address = sockets[0].getsockname()[:2]
            nursery.start_soon(partial(serve_pages, listeners, self._program.pages, bound=self.metrics_address[0]))
            log.info("metrics and health", url=f"http://{address_text(self.metrics_address)}/metrics")

    async def _watch_stop(self, working: trio.Nursery) -> None:
        """Let open requests finish, then end the link politely."""
        await self._stopping.wait()
        links = [attempt.link for attempt in self._attempts if attempt.connected]
        if links:
            for link in links:
                link.session.control(frames.GOAWAY, control.pack_goaway("the agent is shutting down"))
            forwarder = self._forwarder
            if forwarder is not None:
                timeout = self.settings.drain_timeout
                async with open_pair() as nursery:
                    nursery.start_soon(say_drain, log, lambda: forwarder.active, timeout)
                    with trio.move_on_after(timeout):
                        await forwarder.wait_idle()
                    nursery.cancel_scope.cancel()
            for link in links:
                link.close("the agent was stopped")
            with trio.move_on_after(2):
                for link in links:
                    await link.ended.wait()
        working.cancel_scope.cancel()

    async def _keep(self, slot: Slot) -> None:
        """Keep a link for this slot: dial it again and again."""
        retries = failures = 0
        had_link = False  # before, it gets its first one, which is no reconnection however often it tries
        async with open_pair() as links:
            while not self._draining and not slot.is_over:
                began = monotonic()
                attempt = _Attempt(slot, failures + 1)
                links.start_soon(self._attempt, attempt)
                await attempt.over.wait()
                if self._draining or slot.is_over:
                    return
                if attempt.failed:
                    self._counts.consecutive_errors += 1
                    self._counts.reconnection_errors += had_link
                    if not self._connected:  # else a core that ends still serves us, and its successor is on the way
                        retries += 1
                    if 0 <= self.settings.max_retries < retries:
                        attempts = "1 attempt" if retries == 1 else f"{retries} attempts"
                        raise Stopped(
                            f"no link to {self.settings.server} after {attempts} (-max-retries)", "max_retries"
                        )
                elif monotonic() - began > 5:
                    retries = 0
                failures = failures + 1 if attempt.failed else 0
                had_link = had_link or attempt.was_up
                self._counts.reconnections += had_link
                say = log.info if attempt.is_told or not attempt.failed else log.debug
                say("reconnecting", server=self.settings.server, wait=f"{attempt.wait:.2f}s", attempt=failures + 1)
                await trio.sleep(attempt.wait)

    async def _attempt(self, attempt: _Attempt) -> None:
        """One link from dialling to its end; settles when the next one is due."""
        settings, backoff = self.settings, attempt.slot.backoff
        link = attempt.link = Link(
            False,
            settings.heartbeat,
            settings.heartbeat_timeout,
            partial(self._on_opened, attempt),
            self._held,
            self._ready,
            self._most_window,
        )
        self._attempts.append(attempt)
        came_up = 0.0
        try:
            async with open_pair() as nursery:
                connect = _Connect(
                    settings.server, nursery=nursery, attempt=attempt, link=attempt.link, slot=attempt.slot
                )
                await self._handle_connect(connect)
                attempt.was_up, came_up = True, monotonic()
                await self._handle_link(_Attached(connect, attempt=attempt))
                nursery.cancel_scope.cancel()
        except Refused as exc:
            if exc.final:
                advice = "; give one with -token-file" if exc.reason == "missing_token" else ""
                raise Stopped(f"the core at {settings.server} refused this agent: {exc}{advice}", exc.reason) from None
            self._tell(attempt, "connection refused", exc, reason=exc.reason)
            if exc.reason in SLOW_REFUSALS:
                attempt.settle(backoff.after_refusal(exc.retry_after), failed=True)
            else:
                attempt.settle(backoff.after_network_error(exc.retry_after), failed=True)
        except TunnelError as exc:
            self._tell(attempt, "connection failed", exc)
        except Exception as exc:  # a bug here must not leave the machine unreachable
            self._tell(attempt, "connection broke", exc)
        else:
            lasted = monotonic() - came_up
            log.info("link ended", reason=link.end_reason, lasted=f"{lasted:.1f}s", **attempt.traced)
            if attempt.is_surplus:
                attempt.settle(backoff.after_refusal())
            elif not attempt.went_away:
                attempt.settle(backoff.after_link(lasted))
        finally:
            self._retire(attempt)
        if not attempt.over.is_set():
            attempt.settle(backoff.after_network_error(), failed=True)

    def _tell(self, attempt: _Attempt, msg: str, exc: Exception, **fields: str) -> None:
        """Say why an attempt has failed; in the log in full once, then now and then. attempts: that failed like this
        since it was said."""
        attempts = self._telling.failed(f"{msg}: {exc!r}", trio.current_time())
        attempt.is_told = attempts > 0
        shown = exc if msg == "connection broke" else str(exc)
        fields |= attempt.traced
        if attempts:
            log.error(msg, server=self.settings.server, **fields, error=shown, attempts=attempts)
        else:
            log.debug(msg, server=self.settings.server, **fields, error=shown)

    def _retire(self, attempt: _Attempt) -> None:
        """Keep an ended link's counts."""
        link = attempt.link
        counts, session = self._counts, link.session
        counts.frames_received += session.frames_in
        counts.frames_sent += session.frames_out
        counts.frames_error += session.frames_bad
        counts.heartbeats_sent += link.heartbeats_sent
        counts.heartbeats_failed += link.heartbeats_failed
        self._round_trips = [*self._round_trips, *link.round_trips][-1000:]
        self._attempts.remove(attempt)

    # Getting a link up ----------------------------------------------------------------------------------------

    async def _connect(self, visit: _Connect) -> None:
        """The innermost handler of a connect visit. Raises Refused, TunnelError."""
        attempt = visit.attempt
        attempt.traced = visit.trace_fields
        (log.info if attempt.is_told else log.debug)(
            "connecting to server", server=self.settings.server, **attempt.traced
        )
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                carrier = await self._dial(visit)
                await self._introduce(visit, carrier)
            visit.outcome = "ok"
        except trio.TooSlowError:
            visit.outcome, visit.error = "timeout", "the core did not answer in time"
            raise TunnelError(f"{visit.error} ({CONNECT_TIMEOUT:g} s)") from None
        except Refused as exc:
            visit.outcome, visit.reason, visit.error = "refused", exc.reason, str(exc)
            raise
        except TunnelError as exc:
            visit.outcome, visit.error = "link_lost", str(exc)
            raise

    async def _dial(self, visit: _Connect) -> transport.Transport:
        """A WebSocket, from one of the tries at it (tunnel/agent/racing.py); only that one goes on to the hello."""
        worker = visit.slot.worker if len(self._slots.all) > 1 else None
        race: Race[_Reached] = Race(visit.nursery, partial(self._reach, visit.link.on_message, worker))
        carrier, marks = await race.win()
        visit.marks.update(marks)
        visit.nursery.start_soon(visit.link.run, carrier)
        return carrier

    async def _reach(self, on_message: transport.OnMessage, worker: int | None, one: Try[_Reached]) -> None:
        """worker: of the core, that the connection is meant for."""
        host, port = parse_address(self.settings.server)
        if worker not in self._tls:
            self._tls[worker] = dialing.tls_context(self.settings, worker)
        tls = self._tls[worker]
        socket = await dialing.dial_core(host, port)
        try:
            marks = {"dialed": monotonic()}
            one.step()
            if tls is not None:
                socket = await dialing.secure(socket, tls, host, self.settings)
                marks["tls"] = monotonic()
                one.step()
            query = "" if worker is None else f"worker={worker}"
            async with open_pair() as nursery:
                carrier = await transport.connect(nursery, socket, host, on_message, query=query)
                marks["websocket"] = monotonic()
                if one.arrive((carrier, marks)):
                    await trio.sleep_forever()  # its reader runs until the attempt is over
                nursery.cancel_scope.cancel()
        except (trio_websocket.HandshakeError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise TunnelError(dialing.explain_handshake(self.settings, exc)) from exc
        finally:
            socket.close()

    async def _introduce(self, visit: _Connect, carrier: transport.Transport) -> None:
        hello = Hello(
            [frames.VERSION],
            __version__,
            self.agent_id,
            self.settings.token,
            [
                TunnelRequest(one.name, "tcp" if one.scheme == "tcp" else "http", f"{one.scheme}://{one.address}")
                for one in self.locals
            ],
            self._instance,
            MAX_STREAMS,
            [control.WORKERS],
            f"{self._process}.{visit.slot.number}",
            self._most_window,
            self.settings.drain_timeout,
        )
        visit.link.session.control(frames.HELLO, control.encode(hello))
        try:
            async with open_pair() as nursery:
                nursery.start_soon(_watch_silence, carrier)
                kind, payload = await visit.link.receive_control()
                nursery.cancel_scope.cancel()
            if kind == frames.REFUSED:
                refusal = control.decode(RefusedMessage, payload)
                raise Refused(refusal.reason, refusal.text, refusal.retry_after)
            if kind != frames.WELCOME:
                raise WireError(f"the core answered the hello with {frames.NAMES[kind]}")
            welcome = control.decode(Welcome, payload)
        except trio.EndOfChannel:
            raise TunnelError(f"the link ended before the core's welcome: {visit.link.end_reason}") from None
        if welcome.version != frames.VERSION:
            raise WireError(f"the core chose link protocol {welcome.version}, which this agent did not offer")
        if len(welcome.tunnels) != len(self.locals):
            raise WireError("the core's welcome names another number of tunnels")
        self._settle(visit, welcome)
        visit.welcome = welcome
        visit.account_id, visit.connection_id = welcome.account_id, welcome.connection_id
        visit.agent_id = self.agent_id
        visit.marks["authenticated"] = monotonic()
        log.info(
            "authenticated",
            agent_id=self.agent_id,
            account_id=welcome.account_id,
            connection_id=welcome.connection_id,
            server_version=welcome.core_version,
            **({"server_worker": welcome.worker} if welcome.workers > 1 else {}),
            **visit.trace_fields,
        )
        tunnels = [
            Tunnel(grant.name, grant.url, f"{one.scheme}://{one.address}")
            for grant, one in zip(welcome.tunnels, self.locals, strict=True)
        ]
        if tunnels == self.tunnels and any(self._is_served(slot) for slot in self._slots.all):
            return  # said by the first of these links
        self.tunnels = tunnels
        for tunnel in tunnels if self._process == 0 else ():
            log.info("tunnel ready", tunnel=tunnel.name, url=tunnel.url, local=tunnel.local, **visit.trace_fields)

    def _settle(self, visit: _Connect, welcome: Welcome) -> None:
        """See to it that each of the core's workers gets a link, and none two."""
        is_needed, fresh = self._slots.settle(
            visit.slot, welcome.workers, welcome.worker, partial(self._is_served, core=welcome.core)
        )
        visit.attempt.is_surplus = visit.attempt.went_away = not is_needed
        visit.attempt.core = welcome.core
        visit.attempt.core_drain = control.drain_seconds(welcome.drain_timeout, self.settings.drain_timeout)
        assert self._keeping is not None
        for slot in fresh:
            self._keeping.start_soon(self._keep, slot)

    # A link that is up ----------------------------------------------------------------------------------------

    async def _attached(self, visit: _Attached) -> None:
        """The innermost handler of a link visit: until the link ends. (The streams are tasks beside it.)"""
        attempt = visit.attempt
        link = attempt.link
        came_up = monotonic()
        attempt.connected = True
        self._counts.consecutive_errors = 0
        self._telling.came_up()
        self._sweeper.add(link)
        if self._on_up is not None:
            self._on_up.started()
            self._on_up = None
        try:
            async with self._reporting(attempt) as nursery:
                if attempt.is_surplus:
                    nursery.start_soon(give_up, link, self.settings.server, self.settings.drain_timeout)
                while True:
                    kind, payload = await link.receive_control()
                    if kind == frames.GOAWAY and not attempt.went_away:
                        attempt.went_away = True
                        visit.state = "draining"
                        log.info(
                            "the core sends us away",
                            reason=payload.decode("utf-8", "replace"),
                            **attempt.traced,
                        )
                        attempt.settle(attempt.slot.backoff.after_link(monotonic() - came_up, go_away=True))
                        nursery.start_soon(see_off, link, attempt.core_drain)
                        left = [one.link for one in self._attempts if one.slot is attempt.slot and one.went_away]
                        nursery.start_soon(leave_oldest, left)
                    elif kind == frames.REFUSED:
                        refusal = control.decode(RefusedMessage, payload)
                        raise Refused(refusal.reason, refusal.text, refusal.retry_after)
        except trio.EndOfChannel:
            visit.outcome, visit.error = "link_lost", "" if attempt.went_away or self._draining else link.end_reason
        finally:
            attempt.connected = False
            self._sweeper.discard(link)

    @asynccontextmanager
    async def _reporting(self, attempt: _Attempt):  # type: ignore[no-untyped-def]
        """Send our metrics over the link now and then, while the block runs."""
        async with open_pair() as nursery:
            if self._member is None:
                nursery.start_soon(self._report, attempt)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()

    def _reporter(self) -> _Attempt | None:
        """Of several links the one that carries reports."""
        return next((one for one in self._attempts if one.connected and not one.went_away), None)

    def send_report(self, report: bytes) -> bool:
        """Send a report of all workers of this agent, if there is a link."""
        attempt = self._reporter()
        if attempt is None or attempt.link.session.queued_bytes >= frames.MAX_DATA:
            return False
        attempt.link.session.control(frames.REPORT, report)
        return True

    async def _report(self, attempt: _Attempt) -> None:
        link = attempt.link
        while True:
            await trio.sleep(min(1.0, self.settings.metrics.report_interval))
            first = self._reporter()
            if self._program.make_report is not None and (first is attempt or attempt.went_away):
                try:
                    report = self._program.make_report()
                except Exception as exc:
                    log.error("metrics report broke", error=exc)
                    return
                if len(report) <= frames.MAX_DATA and link.session.queued_bytes < frames.MAX_DATA:
                    link.session.control(frames.REPORT, report)
            await trio.sleep(max(0.0, self.settings.metrics.report_interval - 1.0))

    def _on_opened(self, attempt: _Attempt, stream: Stream) -> None:
        """A visitor's stream: a worker of the link's own nursery serves it."""
        assert self._forwarder is not None
        if stream.link.nursery is None or not stream.link.is_welcomed:
            raise WireError("the core opened a stream before its welcome")
        if len(stream.link.session.streams) > MAX_STREAMS + 100:  # probes come on top
            stream.reset("overloaded", "the agent has more open requests than it said it would take")
            return
        if self._held.is_full:
            stream.reset("overloaded", "the agent holds as many unread and unsent bytes as it may (-max-buffer)")
            return
        if attempt.workers is None:
            attempt.workers = Workers(stream.link.nursery, self._serve_stream)
            observers = self._forwarder.observers
            if observers is not None and self._ready is not None:
                attempt.quick = Quick(self._forwarder, observers, self._ready, attempt.workers.submit, self._under_way)
                stream.link.nursery.start_soon(attempt.quick.run)
        if attempt.quick is None or not attempt.quick.begin(stream, self.services, self.agent_id):
            attempt.workers.submit(stream)

    async def _serve_stream(self, job: Stream | ServedStream, scope: Cancellable) -> None:
        """job: a stream, or one that was begun without a task."""
        assert self._forwarder is not None
        if isinstance(job, ServedStream):
            await self._forwarder.go_on(job, scope)
        else:
            await self._forwarder.serve(job.link, job, self.services, self.agent_id, scope)


async def _watch_silence(carrier: transport.Transport) -> None:
    """Until cancelled: a welcome may take its time, but the core's WebSocket answers at once, or the connection has
    broken without a word. Raises TunnelError."""
    while True:
        with trio.move_on_after(SILENCE) as scope:
            await carrier.ping()
        if scope.cancelled_caught:
            raise TunnelError("the core has fallen silent before its welcome")
        await trio.sleep(0.5)


def default_agent_id() -> str:
    """The host's name, made fit for a label."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stdlib_socket.gethostname())
    return name.strip("-.")[:63] or "agent"


__all__ = ["Agent", "ConfigError", "Socket", "Stopped", "Tunnel"]
