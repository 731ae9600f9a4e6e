"""An agent of several workers: processes that serve the same local services under one name, with links of their own.

The supervisor starts them, is one agent to whoever looks (one log, one page of metrics, one health, one report over a
link), and ends them. The first worker dials alone; the others begin when it has a link, so that what the core refuses
is refused, and said, once.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from tunnel.agent.client import Agent, Stopped, default_agent_id
from tunnel.agent.pages import listen_for_pages
from tunnel.config import AgentSettings, sections
from tunnel.errors import ConfigError
from tunnel.handler import AgentStatistics
from tunnel.http.pages import serve_pages
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.net import address_text
from tunnel.plugins import Program
from tunnel.wire import frames
from tunnel.workers.channel import ChannelLost, Handler
from tunnel.workers.crew import Crew
from tunnel.workers.process import Worker
from tunnel.workers.whole import Whole, WorkerPages

log = get_logger("tunnel.agent")


class Said(msgspec.Struct):
    """What a worker has to say of itself."""

    statistics: AgentStatistics
    checks: dict[str, dict[str, Any]]
    details: dict[str, Any]


class Supervisor:
    """An agent with these settings, as `Agent` is one. Raises ConfigError for settings that can't work."""

    def __init__(self, settings: AgentSettings) -> None:
        if not sys.platform.startswith("linux"):
            raise ConfigError("-workers: several processes as one agent need Linux")
        Agent(settings)  # raises what is wrong with them, before anything is started
        self.settings = settings
        self.agent_id = settings.agent_id or default_agent_id()
        self.metrics_address: tuple[str, int] | None = None
        self._instance = secrets.token_hex(8)
        self._stopping = trio.Event()
        self._stopped: Stopped | None = None
        self._gone = AgentStatistics(self.agent_id, False, 0, 0, 0, 0, 0, 0, 0, 0)  # of workers that have ended
        self._crew = Crew(
            settings.workers,
            module="tunnel.agent",
            log_level=settings.log_level,
            log_json=settings.log_json,
            orders=self._orders,
            handlers=self._handlers,
        )
        self._program = Program("agent", sections(settings), self.statistics, list)
        self._whole = Whole(
            self._program,
            self._crew,
            "agent",
            Said,
            self._retire,
            is_ending=self._stopping.is_set,
            alike=("local_services",),  # each worker looks at them all
        )

    # What others may ask --------------------------------------------------------------------------------------

    def statistics(self) -> AgentStatistics:
        """Of all workers, as of their last word, with what those that have ended had counted."""
        total = dataclasses.replace(self._gone)
        for _, said in self._whole.said:
            one = said.statistics
            total.connected = total.connected or one.connected
            total.consecutive_errors = max(total.consecutive_errors, one.consecutive_errors)
            _count(total, one)
        return total

    def _retire(self, said: Said) -> None:
        _count(self._gone, said.statistics)

    # Running --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop gracefully, as `Agent.stop`."""
        self._stopping.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped. Raises Stopped and ConfigError, as `Agent.run`."""
        async with open_pair() as nursery:
            async with self._program.supervised(self.settings.layers, nursery):
                self._serve_pages(nursery)
                await nursery.start(self._crew.run)
                nursery.start_soon(self._report)
                task_status.started()
                await self._stopping.wait()
                await self._finish()
            nursery.cancel_scope.cancel()
        if self._stopped is not None:
            raise self._stopped

    def _serve_pages(self, nursery: trio.Nursery) -> None:
        if self.settings.metrics_addr:
            sockets = listen_for_pages(self.settings)
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in sockets]
            self.metrics_address = sockets[0].getsockname()[:2]
            pages = WorkerPages(self._program.pages, self._crew)
            nursery.start_soon(partial(serve_pages, listeners, pages, bound=self.metrics_address[0]))
            log.info("metrics and health", url=f"http://{address_text(self.metrics_address)}/metrics")

    async def _finish(self) -> None:
        self._crew.end()
        self._crew.open()  # those that wait are to end too
        self._crew.tell("stop")
        await self._crew.wait_ended(self.settings.drain_timeout)

    async def _report(self) -> None:
        """What all have counted, over one link: the core has one report of an agent."""
        while True:
            await trio.sleep(min(1.0, self.settings.metrics.report_interval))
            report = self._program.make_report() if self._program.make_report is not None else b""
            if 0 < len(report) <= frames.MAX_DATA:
                for worker in self._crew.ready:
                    try:
                        if await worker.channel.call("report", report):
                            break
                    except ChannelLost:
                        continue
            await trio.sleep(max(0.0, self.settings.metrics.report_interval - 1.0))

    # Workers --------------------------------------------------------------------------------------------------

    def _orders(self, worker: Worker) -> tuple[Any, Sequence[int]]:
        return {"settings": msgspec.to_builtins(self.settings), "instance": self._instance}, ()

    def _handlers(self, worker: Worker) -> Mapping[str, Handler]:
        def up(message: Any, files: list[int]) -> None:
            self._crew.open()

        def stopped(message: Any, files: list[int]) -> None:
            text, reason = message
            if self._stopped is None:
                self._stopped = Stopped(text, reason)
            self._stopping.set()

        return {"up": up, "stopped": stopped}


def _count(total: AgentStatistics, one: AgentStatistics) -> None:
    for name in (
        "reconnections", "reconnection_errors", "frames_received", "frames_sent", "frames_error",
        "heartbeats_sent", "heartbeats_failed", "logs_dropped",
    ):  # fmt: skip
        setattr(total, name, getattr(total, name) + getattr(one, name))
