"""What is known of a public request, and of the stream that carries it, while they are handled."""

from __future__ import annotations

import random
from time import monotonic
from typing import TYPE_CHECKING

import trio

from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Tunnel
from tunnel.core.visitor import BODY, Visitor
from tunnel.handler import RequestVisit, StreamVisit
from tunnel.http.heads import Head
from tunnel.link.stream import Stream

if TYPE_CHECKING:
    from tunnel.core.reading import Known

FOREVER = float("inf")
_random = random.Random()


def make_request_id() -> str:
    """Unique, not secret: 64 random bits."""
    return f"{_random.getrandbits(64):016x}"


class Request(RequestVisit, kw_only=True):
    """A public request being handled."""

    visitor: Visitor
    head: Head | None = None
    accept: bytes = b""
    account: Account | None = None
    stream: Stream | None = None
    keep_alive: bool = False
    known: Known | None = None  # the head repeats this one, or is the first of its kind
    body_over: bool = False  # all of the request's body has been read
    head_written: bool = False
    continued: bool = False
    aborted: str = ""
    expired: bool = False
    refusal: Exception | None = None  # why the head could not be read or was not taken
    skipped: bool = False  # an empty line before it
    is_begun: bool = False  # without a task, which may have to go on with it: observers know of it
    opened: RequestStream | None = None  # then: its stream, of which they know too
    reading: bool = False  # waits for the visitor's body
    writing: bool = False  # waits for the visitor to take bytes
    told: bytes = b""  # the fields about who asks, where a proxy has told that
    owed_until: float = 0.0  # its body was small, and passes its account's bandwidth only then (monotonic seconds)
    gone: trio.Event | None = None  # for a `pause`: it was aborted

    @property
    def is_waiting_for_100(self) -> bool:
        """The visitor sends no body before the local service asks for it."""
        return self.head is not None and self.head.expects_continue and not self.continued and not self.bytes_in

    def abort(self, text: str) -> None:
        """The visitor is gone: end the work at the agent."""
        self.aborted = text
        if self.gone is not None:
            self.gone.set()
        if self.stream is not None:
            self.stream.reset("visitor_aborted", text)
        self.visitor.socket.abort()

    def expire(self) -> None:
        """The deadline of the present phase has passed; whose fault that is depends on who is waited for."""
        self.expired = True
        if self.stream is None:
            self.visitor.socket.close()
        elif self.writing:
            self.abort("the visitor did not take the answer in time")
        elif self.reading and not self.is_waiting_for_100:
            self.stream.reset("request_timeout", "the request's body did not arrive in time")
        elif self.visitor.phase == BODY:
            self.stream.reset(
                "timeout",
                f"the answer stalled in its body for {self.visitor.limit:g} s (the core's -body-idle-timeout)",
            )
        else:
            self.stream.reset(
                "timeout",
                f"no answer from the local service within {self.visitor.limit:g} s (the core's -request-timeout)",
            )


class RequestStream(StreamVisit, kw_only=True):
    """A request's stream, with what is needed to open it.

    body: the beginning that rides in the OPEN frame; complete: that is all of it. refusal: why it went no further
    before a task took it on. unsent: what is left of a whole answer for the visitor, to be sent after `delay` seconds.
    crowd: under what the link counts it, while it does.
    """

    request: Request
    agent: AgentLink
    tunnel_entry: Tunnel
    body: bytes = b""
    complete: bool = True
    refusal: Exception | None = None
    unsent: bytes = b""
    delay: float = 0.0
    crowd: str = ""


def make_stream(request: Request, protocol: str, agent: AgentLink, tunnel: Tunnel) -> RequestStream:
    """The stream that is to carry a request over an agent's link."""
    link = agent.visit
    return RequestStream(
        request,
        protocol,
        connection_id=link.connection_id,
        agent_id=link.agent_id,
        account_id=agent.account.id,
        tunnel=tunnel.name,
        method=request.method,
        target=request.target,
        request_id=request.request_id,
        offset=agent.link.offset,
        request=request,
        agent=agent,
        tunnel_entry=tunnel,
    )


async def pause(request: Request, delay: float) -> None:
    """Wait, seconds, as the account's bandwidth asks; that is nobody's time-out. Raises trio.BrokenResourceError when
    the visitor leaves."""
    request.visitor.deadline += delay
    if request.gone is None:
        request.gone = trio.Event()
    if not request.aborted:
        with trio.move_on_after(delay):
            await request.gone.wait()
    if request.aborted:
        raise trio.BrokenResourceError(request.aborted)


def owed(request: Request) -> float:
    """Seconds for which its answer, whatever it is, still has to wait for what its own body owes."""
    return max(0.0, request.owed_until - monotonic()) if request.owed_until else 0.0
