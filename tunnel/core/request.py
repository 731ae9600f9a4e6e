"""What is known of a public request, and of the stream that carries it, while they are handled."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from tunnel.core.quotas import Account
from tunnel.core.registry import AgentLink, Tunnel
from tunnel.core.visitor import Visitor
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


class Request(RequestVisit):
    """A public request being handled."""

    __slots__ = (
        "aborted",
        "accept",
        "account",
        "body_over",
        "continued",
        "expired",
        "head",
        "head_written",
        "is_begun",
        "keep_alive",
        "known",
        "opened",
        "reading",
        "refusal",
        "skipped",
        "stream",
        "visitor",
        "writing",
    )

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor.address, visitor.proto)
        self.visitor = visitor
        self.head: Head | None = None
        self.accept = b""
        self.account: Account | None = None
        self.stream: Stream | None = None
        self.keep_alive = False
        self.known: Known | None = None  # the head repeats this one, or is the first of its kind
        self.body_over = False  # all of the request's body has been read
        self.head_written = False
        self.continued = False
        self.aborted = ""
        self.expired = False
        self.refusal: Exception | None = None  # why the head could not be read or was not taken
        self.skipped = False  # an empty line before it
        self.is_begun = False  # without a task, which may have to go on with it: observers know of it
        self.opened: RequestStream | None = None  # then: its stream, of which they know too
        self.reading = False  # waits for the visitor's body
        self.writing = False  # waits for the visitor to take bytes

    @property
    def is_waiting_for_100(self) -> bool:
        """The visitor sends no body before the local service asks for it."""
        return self.head is not None and self.head.expects_continue and not self.continued and not self.bytes_in

    def abort(self, text: str) -> None:
        """The visitor is gone: end the work at the agent."""
        self.aborted = text
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
        else:
            self.stream.reset("timeout", "no answer from the local service in time")


class RequestStream(StreamVisit):
    """A request's stream, with what is needed to open it.

    body: the beginning that rides in the OPEN frame; complete: that is all of it. refusal: why it went no further
    before a task took it on. unsent: what is left of a whole answer for the visitor, to be sent after `delay` seconds.
    """

    __slots__ = ("agent", "body", "complete", "delay", "refusal", "request", "tunnel_entry", "unsent")

    def __init__(self, request: Request, protocol: str, agent: AgentLink, tunnel: Tunnel) -> None:
        super().__init__(request, protocol)
        self.request = request
        self.agent = agent
        self.tunnel_entry = tunnel
        self.tunnel = tunnel.name
        link = agent.visit
        self.connection_id = link.connection_id
        self.agent_id = link.agent_id
        self.account_id = agent.account.id
        self.method = request.method
        self.target = request.target
        self.request_id = request.request_id
        self.offset = agent.link.offset
        self.body = b""
        self.complete = True
        self.refusal: Exception | None = None
        self.unsent = b""
        self.delay = 0.0


async def pause(request: Request, delay: float) -> None:
    """Wait, seconds, as the account's bandwidth asks; that is nobody's time-out."""
    request.visitor.deadline += delay
    await trio.sleep(delay)
