"""The agents' links that are up, from the welcome to the end, whoever ends them.

An account, a token or a name may be lost meanwhile (`recheck`), an agent may say GOAWAY and take its time, and a drain
sends all of them away.
"""

from __future__ import annotations

from collections import deque
from time import monotonic

import trio

from tunnel.core.accounts import Accounts
from tunnel.core.admission import Admission, Attached
from tunnel.core.limits import Counts
from tunnel.core.registry import AgentLink, Registry
from tunnel.core.reports import Reports
from tunnel.core.tcp import Ports
from tunnel.errors import Refused, WireError
from tunnel.link.link import Link
from tunnel.link.sweeper import Sweeper
from tunnel.log import get_logger
from tunnel.wire import control, frames
from tunnel.wire.control import RefusedMessage

log = get_logger("tunnel.core")

FAREWELL = 5.0  #: seconds that an agent which said GOAWAY, and has no streams, has to close its link itself
PARTING = 2.0  #: seconds for a polite close to leave


class Links:
    """protocol_errors: links and would-be links that broke the protocol. refusals: where their limits are counted."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        ports: Ports,
        reports: Reports,
        sweeper: Sweeper,
        admission: Admission,
        refusals: Counts,
    ) -> None:
        self.protocol_errors = 0
        self._registry = registry
        self._accounts = accounts
        self._ports = ports
        self._reports = reports
        self._sweeper = sweeper
        self._admission = admission
        self._refusals = refusals
        self._round_trips: deque[float] = deque(maxlen=10_000)

    async def serve(self, visit: Attached) -> None:
        """The innermost handler of a link visit: until the link ends."""
        agent = visit.agent
        assert agent is not None
        link = agent.link
        self._sweeper.add(link)
        self._reports.begin(visit.account_id, visit.agent_id, visit.connection_id, agent.instance)
        log.info(
            "agent connected",
            agent_id=visit.agent_id,
            account_id=visit.account_id,
            connection_id=visit.connection_id,
            remote=visit.remote,
            tunnels=sorted(agent.indexes),
            **visit.parent.trace_fields,
        )
        try:
            while True:
                kind, payload = await link.receive_control()
                if kind == frames.REPORT:
                    self._reports.take(visit.account_id, visit.agent_id, visit.connection_id, payload)
                elif kind == frames.GOAWAY:
                    # The agent finishes what it has; new requests go to others or find no agent.
                    visit.state = "draining"
                    if link.nursery is not None and not agent.withdrawn:
                        link.nursery.start_soon(self._see_off, link, visit.farewell)
                    await self._admission.withdraw(agent)
        except trio.EndOfChannel:
            visit.outcome = "ok" if self._admission.is_draining or agent.withdrawn else "link_lost"
            visit.error = "" if visit.outcome == "ok" else link.end_reason
        finally:
            self._sweeper.discard(link)
            self._round_trips.extend(link.round_trips)
            if link.breach is not None:
                self.note_breach(link.breach)
            self._reports.end(visit.account_id, visit.agent_id, visit.connection_id)
            await self._admission.withdraw(agent)
            self._registry.detach(agent)
            log.info(
                "agent disconnected",
                agent_id=visit.agent_id,
                account_id=visit.account_id,
                connection_id=visit.connection_id,
                reason=link.end_reason,
                lasted=f"{monotonic() - visit.started:.1f}s",
                **visit.parent.trace_fields,
            )

    async def _see_off(self, link: Link, seconds: float) -> None:
        """End the link of an agent that said GOAWAY and does not do it: it serves nobody, and is one more to keep."""
        with trio.move_on_after(seconds):
            while True:
                await trio.sleep(FAREWELL)
                if not link.session.streams:
                    break
        link.close("the agent said GOAWAY and had time to finish")
        await trio.sleep(PARTING)
        link.end("the agent does not read")

    def note_breach(self, breach: WireError) -> None:
        self.protocol_errors += 1
        if breach.limit:
            self._refusals[breach.limit] += 1

    # What others may ask --------------------------------------------------------------------------------------

    def take_round_trips(self) -> list[float]:
        for agent in self._registry.links.values():
            self._round_trips.extend(agent.link.round_trips)
            agent.link.round_trips.clear()
        taken = list(self._round_trips)
        self._round_trips.clear()
        return taken

    def recheck(self) -> None:
        """Accounts, tokens or names have changed: end the links that may be there no longer.

        A link ends too with one of its names lost: its agent would be refused with that name if it came now.
        """
        for agent in list(self._registry.links.values()):
            visit = agent.visit
            assert isinstance(visit, Attached)
            refusal = self._accounts.check(visit.grant)
            if refusal is not None:
                self._revoke(agent, refusal)
        for name, (account_id, refusal) in self._accounts.take_lost().items():
            tunnel = self._registry.tunnels.get(name)
            if tunnel is None or tunnel.account_id != account_id:
                continue
            for agent in list(tunnel.links):
                self._revoke(agent, refusal)
            is_served = bool(tunnel.links)
            self._registry.forget(tunnel)
            if is_served and tunnel.protocol == "tcp":
                self._ports.close(tunnel)
            log.info("name taken from its account", tunnel=name, account_id=account_id, reason=refusal.reason)

    def _revoke(self, agent: AgentLink, refusal: Refused) -> None:
        visit, link = agent.visit, agent.link
        if link.end_reason:
            return
        log.info(
            "link revoked",
            agent_id=visit.agent_id,
            connection_id=visit.connection_id,
            reason=refusal.reason,
            **visit.parent.trace_fields,
        )
        link.session.control(frames.REFUSED, control.encode(RefusedMessage(refusal.reason, str(refusal))))
        link.close(str(refusal))

    def send_away(self, reason: str) -> None:
        """Drain: tell the agents to finish and to go elsewhere; new links are refused."""
        self._admission.is_draining = True
        for agent in self._registry.links.values():
            agent.visit.state = "draining"
            agent.link.session.control(frames.GOAWAY, control.pack_goaway(reason))

    def close_all(self, reason: str) -> None:
        for agent in list(self._registry.links.values()):
            agent.link.close(reason)
