"""The agent: its parts, the order in which they start, and how they end."""

from __future__ import annotations

import secrets
import socket as stdlib_socket
from collections.abc import Sequence
from functools import partial

import trio

from tunnel.agent.farewell import PARTING
from tunnel.agent.forward import Forwarder
from tunnel.agent.keeping import Keeper, Stopped, Tunnel
from tunnel.agent.pages import listen_for_pages
from tunnel.agent.probing import LocalProber
from tunnel.agent.streams import Streams
from tunnel.config import AgentSettings, parse_local, sections
from tunnel.errors import ConfigError
from tunnel.handler import AgentStatistics, Layer
from tunnel.http.client import Service
from tunnel.http.pages import serve_pages
from tunnel.interrupts import say_drain
from tunnel.link.sweeper import Sweeper
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import Socket, address_text
from tunnel.plugins import Program
from tunnel.ready import make_ready
from tunnel.wire import control, frames
from tunnel.workers.member import Member

log = get_logger("tunnel.agent")


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
        self.metrics_address: tuple[str, int] | None = None
        self._stopping = trio.Event()
        self._sweeper = Sweeper(lambda exc: log.error("a deadline check broke", error=exc))
        self._ready = make_ready(lambda exc: log.error("a socket's function broke", error=exc))
        self._keeper = Keeper(
            settings,
            self.agent_id,
            self.locals,
            instance=member.orders["instance"] if member is not None else secrets.token_hex(8),
            process=member.number if member is not None else 0,
            is_reporting=member is None,
            sweeper=self._sweeper,
            ready=self._ready,
        )
        figures = self._keeper.figures
        self._program = Program("agent", sections(settings), figures.statistics, figures.take_round_trips)
        figures.program = self._program
        self._program.checks["link"] = self._keeper.check
        self._prober = LocalProber(self.services)
        self._program.set_details("local_services", self._prober.details)
        self._program.offer("agent", figures.say)
        if member is not None:
            member.program = self._program
        self._forwarder: Forwarder | None = None

    @property
    def tunnels(self) -> list[Tunnel]:
        return self._keeper.tunnels

    def statistics(self) -> AgentStatistics:
        return self._keeper.figures.statistics()

    def send_report(self, report: bytes) -> bool:
        """Send a report of all workers of this agent, if there is a link."""
        return self._keeper.figures.send_report(report)

    def stop(self) -> None:
        """Stop gracefully: open requests get `drain_timeout` to finish, then `run` returns."""
        self._keeper.is_draining = True
        self._stopping.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped; started once the first link is up.

        Raises Stopped (refused credentials, retries used up) and ConfigError (metrics address, plug-ins).
        """
        self._keeper.on_up = task_status.started
        async with open_pair() as nursery:
            async with self._program.plugged_in(self.settings.layers, nursery) as layers:
                await self._start(nursery, layers)
                async with open_pair() as working:
                    working.start_soon(self._watch_stop, working)
                    await self._keeper.run()
                    working.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery, layers: Sequence[Layer]) -> None:
        self._forwarder = Forwarder(layers, self._sweeper, self.settings.request_timeout)
        streams = Streams(
            self._forwarder, self.services, self.agent_id, self._keeper.held, self._keeper.places, self._ready
        )
        self._keeper.plug(layers, streams)
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
        links = [attempt.link for attempt in self._keeper.attempts if attempt.connected]
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
            with trio.move_on_after(PARTING):
                for link in links:
                    await link.ended.wait()
        working.cancel_scope.cancel()


def default_agent_id() -> str:
    """The host's name, made fit for a label."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stdlib_socket.gethostname())
    return name.strip("-.")[:63] or "agent"


__all__ = ["Agent", "ConfigError", "Socket", "Stopped", "Tunnel"]
