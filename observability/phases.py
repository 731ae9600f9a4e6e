"""Where a request's time went: visitor → queue → link → agent → local → link → visitor.

The phases are cut from one clock, the core's, at the marks of the visit; only `agent` and `local` are durations that
the agent measured, taken out of the stretch in which the core waited. So clock skew cannot bend them, and they add up
to the whole by construction.
"""

from __future__ import annotations

from tunnel.handler import RequestVisit

#: phase → the mark it begins at; "visitor" begins with the visit. Each ends at the next mark there is.
_BEGINS = (("queue", "head"), ("link", "opened"), ("answer", "answered"), ("body", "first_byte"))


def phases(visit: RequestVisit, ended: float) -> dict[str, float]:
    """Milliseconds by phase, in order, of a request that ended at `ended` (monotonic seconds).

    visitor: its head arrives. queue: until a stream is open. link: the way to the agent and back. agent, local: their
    shares up to the answer's head. answer: until that head is written. body: the rest. A phase that was not reached is
    missing; the one in which the request got stuck has the time. The sum is the visit's duration.
    """
    marks = visit.marks
    agent_ms = visit.agent_us / 1e3
    out: dict[str, float] = {}
    name, began = "visitor", visit.started
    for following, mark in _BEGINS:
        at = marks.get(mark)
        if at is None and mark == "first_byte":
            at = marks.get("upgraded")
        if at is None:
            continue
        if at > ended:
            at = ended
        if at < began:
            at = began
        spent = (at - began) * 1e3
        if name == "link" and following == "answer" and agent_ms >= 0:
            remote = min(agent_ms, spent)
            local = min(max(visit.local_us, 0) / 1e3, remote)
            out["link"], out["agent"], out["local"] = spent - remote, remote - local, local
        else:
            out[name] = spent
        name, began = following, at
    out[name] = max(ended - began, 0.0) * 1e3
    return out
