"""Is what we list as connected really there? Each link's data path is tried now and then, down to the local service.

A probe is a stream of its own kind: it takes the way of every request through both run loops and ends in a TCP connect
at the agent. It sends no HTTP, counts in no metric, and its result is what `up` means on the status page.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import Any

import trio

from tunnel.core.registry import AgentLink, Registry
from tunnel.errors import Failure
from tunnel.link.stream import Stream
from tunnel.log import get_logger
from tunnel.wire import frames
from tunnel.wire.frames import NO_BODY, Open

log = get_logger("tunnel.core")

INTERVAL = 15.0  #: seconds between two probes of a tunnel on a link
FIRST = 0.5  #: seconds to the first one
AT_ONCE = 16  #: probes under way


@dataclass(slots=True)
class Probe:
    """The newest result. outcome: "ok" or what a request would have met; at: seconds since 1970."""

    outcome: str
    reason: str
    milliseconds: float
    at: float


class Prober:
    """Probes every tunnel on every link. timeout: seconds for one probe."""

    def __init__(self, registry: Registry, timeout: float, interval: float = INTERVAL) -> None:
        self._registry = registry
        self._timeout = timeout
        self._interval = interval
        self._results: dict[tuple[str, str], Probe] = {}  # by connection id and tunnel name

    async def run(self) -> None:
        """Until cancelled. New links are noticed within half a second."""
        next_round = 0.0
        limiter = trio.CapacityLimiter(AT_ONCE)
        while True:
            await trio.sleep(FIRST)
            links = dict(self._registry.links)
            for key in [key for key in self._results if key[0] not in links]:
                del self._results[key]
            everything = trio.current_time() >= next_round
            if everything:
                next_round = trio.current_time() + self._interval
            async with trio.open_nursery() as nursery:
                for connection_id, agent in links.items():
                    for name in agent.indexes:
                        if everything or (connection_id, name) not in self._results:
                            nursery.start_soon(self._probe, agent, name, limiter)

    async def _probe(self, agent: AgentLink, name: str, limiter: trio.CapacityLimiter) -> None:
        key = (agent.visit.connection_id, name)
        async with limiter:
            if agent.link.end_reason or agent.withdrawn:
                return
            began = trio.current_time()
            opened = Open(frames.PROBE, agent.indexes[name], int(self._timeout * 1000), NO_BODY, b"", b"")
            stream = agent.link.session.open(opened, b"", True)
            assert isinstance(stream, Stream)
            outcome, reason = "timeout", f"the agent did not answer within {self._timeout:g} s"
            try:
                with trio.move_on_after(self._timeout):
                    await stream.answer()
                    outcome, reason = "ok", "the local service accepts connections"
            except Failure as exc:
                outcome, reason = exc.outcome, str(exc)
            finally:
                stream.reset("ok")
            if outcome == "link_lost":
                return
        before = self._results.get(key)
        elapsed = round((trio.current_time() - began) * 1000, 2)
        self._results[key] = Probe(outcome, reason, elapsed, time())
        if outcome != (before.outcome if before else "ok"):
            log.info("probe", tunnel=name, agent_id=agent.visit.agent_id, outcome=outcome, reason=reason)

    def details(self) -> dict[str, Any]:
        """By tunnel name, then by connection."""
        found: dict[str, Any] = {}
        for (connection_id, name), probe in self._results.items():
            found.setdefault(name, {})[connection_id] = {
                "up": probe.outcome == "ok",
                "outcome": probe.outcome,
                "reason": probe.reason,
                "milliseconds": probe.milliseconds,
                "age_seconds": round(time() - probe.at, 1),
            }
        return found
