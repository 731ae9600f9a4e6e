"""Where a request's time went: visitor → queue → link → agent → local → link → visitor.

The phases are cut from one clock, the core's, at the marks of the visit; only `agent` and `local` are durations that
the agent measured, taken out of the stretch in which the core waited. So clock skew cannot bend them, and they add up
to the whole by construction.
"""

from __future__ import annotations

from tunnel.handler import RequestVisit

#: phase → the mark it begins at ("" is the visit's start). It ends at the next mark there is.
_BEGINS = (("visitor", ""), ("queue", "head"), ("link", "opened"), ("answer", "answered"), ("body", "first_byte"))


def phases(visit: RequestVisit, ended: float) -> dict[str, float]:
    """Milliseconds by phase, in order, of a request that ended at `ended` (monotonic seconds).

    visitor: its head arrives. queue: until a stream is open. link: the way to the agent and back. agent, local: their
    shares up to the answer's head. answer: until that head is written. body: the rest. A phase that was not reached is
    missing; the one in which the request got stuck has the time. The sum is the visit's duration.
    """
    marks = visit.marks
    points: list[tuple[str, float]] = []
    latest = visit.started
    for name, mark in _BEGINS:
        at = visit.started if not mark else marks.get(mark)
        if at is None and mark == "first_byte":
            at = marks.get("upgraded")
        if at is not None:
            latest = max(latest, min(at, ended))
            points.append((name, latest))
    points.append(("", max(latest, ended)))
    spent = {name: (points[i + 1][1] - at) * 1e3 for i, (name, at) in enumerate(points[:-1])}
    if visit.agent_us < 0 or "answered" not in marks or "link" not in spent:
        return spent
    waited = spent["link"]
    remote = min(visit.agent_us / 1e3, waited)
    local = min(max(visit.local_us, 0) / 1e3, remote)
    out: dict[str, float] = {}
    for name, value in spent.items():
        if name == "link":
            out |= {"link": waited - remote, "agent": remote - local, "local": local}
        else:
            out[name] = value
    return out
