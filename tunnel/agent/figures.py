"""An agent in numbers: what its links have counted, also those that have ended, and its reports to the core."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from tunnel.agent.attempt import Attempt
from tunnel.handler import AgentStatistics
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.plugins import Program
from tunnel.wire import frames

log = get_logger("tunnel.agent")


class Figures:
    """attempts: the agent's own list of its links. program: to be set before anybody asks. report_interval: seconds
    between two reports; 0: another process sends them."""

    program: Program

    def __init__(self, agent_id: str, attempts: list[Attempt], report_interval: float) -> None:
        self.counts = AgentStatistics(agent_id, False, 0, 0, 0, 0, 0, 0, 0, 0)
        self._attempts = attempts
        self._report_interval = report_interval
        self._round_trips: list[float] = []

    @property
    def is_connected(self) -> bool:
        return any(attempt.connected for attempt in self._attempts)

    def statistics(self) -> AgentStatistics:
        """Counts since the start, those of the present links included."""
        counts = self.counts
        links = [attempt.link for attempt in self._attempts]
        return AgentStatistics(
            counts.agent_id,
            self.is_connected,
            counts.reconnections,
            counts.reconnection_errors,
            counts.consecutive_errors,
            counts.frames_received + sum(link.session.frames_in for link in links),
            counts.frames_sent + sum(link.session.frames_out for link in links),
            counts.frames_error + sum(link.session.frames_bad for link in links),
            counts.heartbeats_sent + sum(link.heartbeats_sent for link in links),
            counts.heartbeats_failed + sum(link.heartbeats_failed for link in links),
            self.program.details().get("logs", {}).get("dropped", 0),
        )

    def say(self) -> bytes:
        checks = self.program.readiness()
        said = {"statistics": self.statistics(), "checks": checks, "details": self.program.details()}
        return msgspec.msgpack.encode(said)

    def take_round_trips(self) -> list[float]:
        taken, self._round_trips = self._round_trips, []
        for attempt in self._attempts:
            taken += attempt.link.round_trips
            attempt.link.round_trips.clear()
        return taken

    def retire(self, attempt: Attempt) -> None:
        """Keep an ended link's counts."""
        link = attempt.link
        counts, session = self.counts, link.session
        counts.frames_received += session.frames_in
        counts.frames_sent += session.frames_out
        counts.frames_error += session.frames_bad
        counts.heartbeats_sent += link.heartbeats_sent
        counts.heartbeats_failed += link.heartbeats_failed
        self._round_trips = [*self._round_trips, *link.round_trips][-1000:]
        self._attempts.remove(attempt)

    # Reports --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reporting(self, attempt: Attempt) -> AsyncIterator[trio.Nursery]:
        """Send our metrics over the link now and then, while the block runs."""
        async with open_pair() as nursery:
            if self._report_interval:
                nursery.start_soon(self._report, attempt)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()

    def _reporter(self) -> Attempt | None:
        """Of several links the one that carries reports."""
        return next((one for one in self._attempts if one.connected and not one.went_away), None)

    def send_report(self, report: bytes) -> bool:
        """Send a report of all workers of this agent, if there is a link."""
        attempt = self._reporter()
        if attempt is None or attempt.link.session.queued_bytes >= frames.MAX_DATA:
            return False
        attempt.link.session.control(frames.REPORT, report)
        return True

    async def _report(self, attempt: Attempt) -> None:
        link = attempt.link
        while True:
            await trio.sleep(min(1.0, self._report_interval))
            first = self._reporter()
            if self.program.make_report is not None and (first is attempt or attempt.went_away):
                try:
                    report = self.program.make_report()
                except Exception as exc:
                    log.error("metrics report broke", error=exc)
                    return
                if len(report) <= frames.MAX_DATA and link.session.queued_bytes < frames.MAX_DATA:
                    link.session.control(frames.REPORT, report)
            await trio.sleep(max(0.0, self._report_interval - 1.0))
