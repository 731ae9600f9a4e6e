"""Where a request's time went: visitor → queue → (upload) → link → agent → local → link → visitor.

The phases are cut from one clock, the core's, at the marks of the visit; only `agent` and `local` are durations that
the agent measured, taken out of the stretch in which the core waited. So clock skew cannot bend them, and they add up
to the whole by construction. Of a stretch without an answer, in which the agent has not said what it waits for, nobody
knows whose it was: that is `remote`.
"""

from __future__ import annotations

from tunnel.handler import RequestVisit

#: phase → the mark it begins at; "visitor" begins with the visit. Each ends at the next mark there is.
_BEGINS = (
    ("queue", "head"),
    ("link", "opened"),
    ("link", "uploaded"),
    ("answer", "answered"),
    ("body", "first_byte"),
)
NAMES = ("visitor", "queue", "link", "agent", "local", "answer", "body", "upload", "remote")


def phases(visit: RequestVisit, ended: float) -> dict[str, float]:
    """Milliseconds by phase, in order, of a request that ended at `ended` (monotonic seconds).

    visitor: its head arrives. queue: until a stream is open. upload: until the last of a body that came in parts has
    left for the agent, or the service took no more of it. link: the way to the agent and back. agent, local: their
    shares up to the answer's head, or to the end of the wait for one; remote: these three together, where nobody knows
    more. answer: until that head is written. body: the rest; what of it an answer that broke off had waited for the
    service is local. A phase that was not reached is missing; the one in which the request got stuck has the time. The
    sum is the visit's duration.
    """
    marks = visit.marks
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
        if mark == "uploaded":
            name = "upload"
        if name == "link":
            _share(out, visit, spent, is_answered=mark == "answered")
        else:
            out[name] = spent
        name, began = following, at
    spent = max(ended - began, 0.0) * 1e3
    if name == "link":
        _share(out, visit, spent, is_answered=False)
    else:
        out[name] = spent
        if name == "body" and visit.stalled_us:
            stalled = min(visit.stalled_us / 1e3, spent)
            out["local"] = out.get("local", 0.0) + stalled
            out["body"] = spent - stalled
    return out


def _share(out: dict[str, float], visit: RequestVisit, spent: float, *, is_answered: bool) -> None:
    """Whose the milliseconds were in which the core waited for an answer."""
    agent_ms = visit.agent_us / 1e3
    if agent_ms >= 0:
        beyond = min(agent_ms, spent)
        local = min(max(visit.local_us, 0) / 1e3, beyond)
        out["link"], out["agent"], out["local"] = spent - beyond, beyond - local, local
    elif is_answered:
        out["link"] = spent
    elif visit.outcome == "request_timeout":
        out["upload"] = out.get("upload", 0.0) + spent
    else:
        out["remote"] = spent
