"""Whose time it was, of a request whose answer did not come, or broke off: what the agent has told of its waiting.

An answer's head says what the agent and the local service took. Without one the core knows when it sent the request,
and what the newest WAITING said (tunnel/SPEC.md): since then the service has been waited for, as long as the agent was
there to wait. Within a body that still comes in it may have gone on meanwhile: unless the agent has not taken what it
has, only the word counts with which it gives up. What came before that wait was upload. Where the agent has said
nothing the shares stay unknown, and nobody gets the blame.
"""

from __future__ import annotations

from time import monotonic

from tunnel.core.request import Request

_FAILED_IN_A_WAIT = frozenset({"timeout", "local_broken"})  #: what an agent says right behind the wait that it gives up


def note_times(request: Request, outcome: str) -> None:
    """Fill in what is known, now that the request has ended so."""
    stream = request.stream
    if stream is None or stream.told is None or outcome == "request_timeout":  # then the visitor was waited for
        return
    at, agent_us, local_us = stream.told
    since = 0
    is_answered = "answered" in request.marks
    if request.body_over or stream.link.session.is_untaken(stream):  # else the agent may wait for more of it by now
        since = max(int((stream.link.alive_until(monotonic()) - at) * 1e6), 0)
    elif not is_answered and (request.expired or request.aborted or outcome not in _FAILED_IN_A_WAIT):
        return
    if not (request.body_over or is_answered):
        request.marks["uploaded"] = max(at - agent_us / 1e6, request.marks["opened"])
    if not is_answered:
        request.agent_us, request.local_us = agent_us + since, local_us + since
    elif at >= request.visitor.wrote:  # else another part has come after it
        request.stalled_us = local_us + since
