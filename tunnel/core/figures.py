"""What is counted of links, as others see it."""

from __future__ import annotations

from time import monotonic, time

from tunnel.core.registry import Registry
from tunnel.handler import LinkStatistics


def links_of(registry: Registry, worker: int) -> list[LinkStatistics]:
    """Of all links that are attached here; worker: which one this process is, 0 if it is none."""
    links = []
    for agent in registry.links.values():
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
                worker,
                visit.remote,
                round(time() - monotonic() + visit.started, 1),
            )
        )
    return links
