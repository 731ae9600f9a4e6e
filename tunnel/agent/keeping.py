"""The agent's links, kept: dialled, served until they end, and dialled again.

Attempt after attempt until told to stop: (1) dial, (2) TLS and the pin, (3) WebSocket, (4) hello and welcome
(tunnel/agent/connecting.py), (5) serve streams until the link ends. What goes wrong decides the next wait
(tunnel/agent/backoff.py); refused credentials end the program, since no retry mends them. A core that sends its agents
away is dialled again at once, while the old link goes on with what it has: another core, or the next release of this
one, may be there already.

To a core of several workers the agent keeps a link to each (tunnel/agent/slots.py), all of them in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

import trio

from tunnel.agent.attempt import Attached, Attempt, Connecting
from tunnel.agent.connecting import Connector
from tunnel.agent.farewell import give_up, leave_oldest, see_off
from tunnel.agent.figures import Figures
from tunnel.agent.places import Places
from tunnel.agent.slots import Slot, Slots
from tunnel.agent.streams import Streams
from tunnel.agent.telling import Telling
from tunnel.config import AgentSettings, LocalService
from tunnel.errors import SLOW_REFUSALS, Refused, TunnelError
from tunnel.handler import Handler, Layer, wrap
from tunnel.link.link import Link
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.ready import Ready
from tunnel.wire import control, frames
from tunnel.wire.control import RefusedMessage, Welcome
from tunnel.wire.held import Held

log = get_logger("tunnel.agent")


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


class Keeper:
    """tunnels: as the newest welcome grants them. held, places: what all links hold, and may bring, together. figures:
    what they have counted.

    instance, process: as for `Connector`. is_reporting: reports go to the core from here. Raises ConfigError for TLS
    that can't work.
    """

    def __init__(
        self,
        settings: AgentSettings,
        agent_id: str,
        locals: Sequence[LocalService],
        *,
        instance: str,
        process: int,
        is_reporting: bool,
        sweeper: Sweeper,
        ready: Ready | None,
    ) -> None:
        self.tunnels: list[Tunnel] = []
        self.attempts: list[Attempt] = []  # the newest last; those before it have been sent away
        self.figures = Figures(agent_id, self.attempts, settings.metrics.report_interval if is_reporting else 0.0)
        self.places = Places(self.attempts)
        self.is_draining = False
        self.on_up: Callable[[], None] | None = None  # called when the first link is up
        most = -(-settings.max_buffer // settings.workers)  # each has its part
        self.held = Held(most, monotonic)
        self._most_window = min(max(most // 4, frames.LEAST_WINDOW), frames.MOST_WINDOW) if most else frames.MOST_WINDOW
        self._settings = settings
        self._agent_id = agent_id
        self._locals = locals
        self._process = process
        self._sweeper = sweeper
        self._ready = ready
        self._slots = Slots()
        self._telling = Telling()
        self._connector = Connector(
            settings,
            agent_id,
            locals,
            self._on_welcome,
            instance=instance,
            process=process,
            most_window=self._most_window,
        )
        self._streams: Streams | None = None
        self._keeping: trio.Nursery | None = None
        self._handle_connect: Handler = self._connector.connect
        self._handle_link: Handler = self._attached

    def plug(self, layers: Sequence[Layer], streams: Streams) -> None:
        """Before `run`. streams: who takes those that the core opens."""
        self._streams = streams
        self._handle_connect = wrap(self._connector.connect, layers)
        self._handle_link = wrap(self._attached, layers)

    async def run(self) -> None:
        """Keep them. Raises Stopped (refused credentials, retries used up)."""
        async with open_pair() as self._keeping:
            await self._keep(self._slots.all[0])

    def check(self) -> tuple[bool, str]:
        if self.is_draining:
            return False, "shutting down"
        if self.figures.is_connected:
            slots = self._slots.all
            up = sum(self._is_served(slot) for slot in slots)
            links = f", {up} of {len(slots)} links" if len(slots) > 1 else ""
            return True, f"connected to {self._settings.server}{links}"
        return False, f"no link to {self._settings.server}"

    def _is_served(self, slot: Slot, core: str | None = None) -> bool:
        """core: the run of the core that the link has to be at; None for any."""
        return any(
            one.slot is slot and one.connected and not one.went_away and core in (None, one.core)
            for one in self.attempts
        )

    async def _keep(self, slot: Slot) -> None:
        """Keep a link for this slot: dial it again and again."""
        retries = failures = 0
        had_link = False  # before, it gets its first one, which is no reconnection however often it tries
        async with open_pair() as links:
            while not self.is_draining and not slot.is_over:
                began = monotonic()
                attempt = Attempt(slot, failures + 1)
                links.start_soon(self._attempt, attempt)
                await attempt.over.wait()
                if self.is_draining or slot.is_over:
                    return
                if attempt.failed:
                    self.figures.counts.consecutive_errors += 1
                    self.figures.counts.reconnection_errors += had_link
                    if not self.figures.is_connected:
                        retries += 1  # else a core that ends still serves us, and its successor is on the way
                    if 0 <= self._settings.max_retries < retries:
                        attempts = "1 attempt" if retries == 1 else f"{retries} attempts"
                        raise Stopped(
                            f"no link to {self._settings.server} after {attempts} (-max-retries)", "max_retries"
                        )
                elif monotonic() - began > 5:
                    retries = 0
                failures = failures + 1 if attempt.failed else 0
                had_link = had_link or attempt.was_up
                self.figures.counts.reconnections += had_link
                say = log.info if attempt.is_told or not attempt.failed else log.debug
                say("reconnecting", server=self._settings.server, wait=f"{attempt.wait:.2f}s", attempt=failures + 1)
                await trio.sleep(attempt.wait)

    async def _attempt(self, attempt: Attempt) -> None:
        """One link from dialling to its end; settles when the next one is due."""
        settings, backoff = self._settings, attempt.slot.backoff
        link = attempt.link = Link(
            False,
            settings.heartbeat,
            settings.heartbeat_timeout,
            partial(self._streams.begin, attempt) if self._streams is not None else None,
            self.held,
            self._ready,
            self._most_window,
        )
        attempt.max_streams = self.places.share(len(self._slots.all))
        self.attempts.append(attempt)
        came_up = 0.0
        try:
            async with open_pair() as nursery:
                connect = Connecting(
                    settings.server,
                    nursery=nursery,
                    attempt=attempt,
                    link=attempt.link,
                    slot=attempt.slot,
                    worker=attempt.slot.worker if len(self._slots.all) > 1 else None,
                )
                await self._handle_connect(connect)
                attempt.was_up, came_up = True, monotonic()
                await self._handle_link(Attached(connect, attempt=attempt))
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
            self.figures.retire(attempt)
        if not attempt.over.is_set():
            attempt.settle(backoff.after_network_error(), failed=True)

    def _tell(self, attempt: Attempt, msg: str, exc: Exception, **fields: str) -> None:
        """Say why an attempt has failed; in the log in full once, then now and then. attempts: that failed like this
        since it was said."""
        attempts = self._telling.failed(f"{msg}: {exc!r}", trio.current_time())
        attempt.is_told = attempts > 0
        shown = exc if msg == "connection broke" else str(exc)
        fields |= attempt.traced
        if attempts:
            log.error(msg, server=self._settings.server, **fields, error=shown, attempts=attempts)
        else:
            log.debug(msg, server=self._settings.server, **fields, error=shown)

    def _on_welcome(self, visit: Connecting, welcome: Welcome) -> None:
        self._settle(visit, welcome)
        log.info(
            "authenticated",
            agent_id=self._agent_id,
            account_id=welcome.account_id,
            connection_id=welcome.connection_id,
            server_version=welcome.core_version,
            **({"server_worker": welcome.worker} if welcome.workers > 1 else {}),
            **visit.trace_fields,
        )
        tunnels = [
            Tunnel(grant.name, grant.url, f"{one.scheme}://{one.address}")
            for grant, one in zip(welcome.tunnels, self._locals, strict=True)
        ]
        if tunnels == self.tunnels and any(self._is_served(slot) for slot in self._slots.all):
            return  # said by the first of these links
        self.tunnels = tunnels
        for tunnel in tunnels if self._process == 0 else ():
            log.info("tunnel ready", tunnel=tunnel.name, url=tunnel.url, local=tunnel.local, **visit.trace_fields)

    def _settle(self, visit: Connecting, welcome: Welcome) -> None:
        """See to it that each of the core's workers gets a link, and none two."""
        is_needed, fresh = self._slots.settle(
            visit.slot, welcome.workers, welcome.worker, partial(self._is_served, core=welcome.core)
        )
        visit.attempt.is_surplus = visit.attempt.went_away = not is_needed
        visit.attempt.core = welcome.core
        visit.attempt.core_drain = control.drain_seconds(welcome.drain_timeout, self._settings.drain_timeout)
        assert self._keeping is not None
        for slot in fresh:
            self._keeping.start_soon(self._keep, slot)

    # A link that is up ----------------------------------------------------------------------------------------

    async def _attached(self, visit: Attached) -> None:
        """The innermost handler of a link visit: until the link ends. (The streams are tasks beside it.)"""
        attempt = visit.attempt
        link = attempt.link
        came_up = monotonic()
        attempt.connected = True
        self.figures.counts.consecutive_errors = 0
        self._telling.came_up()
        self._sweeper.add(link)
        if self.on_up is not None:
            self.on_up()
            self.on_up = None
        try:
            async with self.figures.reporting(attempt) as nursery:
                if attempt.is_surplus:
                    nursery.start_soon(give_up, link, self._settings.server, self._settings.drain_timeout)
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
                        left = [one.link for one in self.attempts if one.slot is attempt.slot and one.went_away]
                        nursery.start_soon(leave_oldest, left)
                    elif kind == frames.REFUSED:
                        refusal = control.decode(RefusedMessage, payload)
                        raise Refused(refusal.reason, refusal.text, refusal.retry_after)
        except trio.EndOfChannel:
            visit.outcome, visit.error = "link_lost", "" if attempt.went_away or self.is_draining else link.end_reason
        finally:
            attempt.connected = False
            self._sweeper.discard(link)
