"""Is what we list as connected really there? Each link's data path is tried now and then, down to the local service.

A probe is a stream of its own kind: it takes the way of every request through both run loops and ends in a TCP connect
at the agent. It sends no HTTP, takes no visitor's place where streams are limited, counts in no metric, and its result
is what `up` means on the status page.

Thousands of tunnels share `PER_SECOND`: each is tried less often then, its result says how old it is, and what probing
costs stays the same. A tunnel that is new is tried before those that had their turn.
"""

from __future__ import annotations

from collections import deque
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

INTERVAL = 15.0  #: seconds between two probes of a tunnel on a link, where they are not many
TURN = 0.5  #: seconds between two looks at what is due; so long may the first probe take to begin
PER_SECOND = 100  #: probes of all tunnels together
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
        self._due: deque[tuple[float, AgentLink, str]] = deque()  # when, whom and what; the next first
        self._seen: dict[str, tuple[AgentLink, int]] = {}  # by connection id: how many of its tunnels are in `_due`

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(TURN)
            self._forget_gone()
            self._note_new()
            batch = self._take_due()
            async with trio.open_nursery() as nursery:
                for _ in range(min(AT_ONCE, len(batch))):
                    nursery.start_soon(self._work, batch)

    def _forget_gone(self) -> None:
        for connection_id in self._seen.keys() - self._registry.links.keys():
            agent, _ = self._seen.pop(connection_id)
            for name in agent.indexes:
                self._results.pop((connection_id, name), None)

    def _note_new(self) -> None:
        now = trio.current_time()
        for connection_id, agent in self._registry.links.items():
            _, known = self._seen.get(connection_id, (agent, 0))
            if known < len(agent.indexes):
                self._seen[connection_id] = (agent, len(agent.indexes))
                self._due.extendleft((now, agent, name) for name in list(agent.indexes)[known:])

    def _take_due(self) -> list[tuple[AgentLink, str]]:
        """Of links that are still there; these have their next turn after the interval."""
        now = trio.current_time()
        batch: list[tuple[AgentLink, str]] = []
        while self._due and self._due[0][0] <= now and len(batch) < PER_SECOND * TURN:
            _, agent, name = self._due.popleft()
            if self._registry.links.get(agent.visit.connection_id) is agent:
                batch.append((agent, name))
                self._due.append((now + self._interval, agent, name))
        return batch

    async def _work(self, batch: list[tuple[AgentLink, str]]) -> None:
        while batch:
            await self._probe(*batch.pop())

    async def _probe(self, agent: AgentLink, name: str) -> None:
        if agent.link.end_reason or agent.withdrawn or not agent.is_welcomed:
            return
        key = (agent.visit.connection_id, name)
        began = trio.current_time()
        opened = Open(frames.PROBE, agent.indexes[name], int(self._timeout * 1000), NO_BODY, b"", b"")
        stream = agent.link.session.open(opened, b"", True)
        assert isinstance(stream, Stream)
        agent.probes.add(stream.id)
        outcome, reason = "timeout", f"the agent did not answer within {self._timeout:g} s"
        try:
            with trio.move_on_after(self._timeout):
                await stream.answer()
                outcome, reason = "ok", "the local service accepts connections"
        except Failure as exc:
            outcome, reason = exc.outcome, str(exc)
        finally:
            stream.reset("ok")
            agent.probes.discard(stream.id)
        if outcome == "link_lost" or self._registry.links.get(key[0]) is not agent:
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
