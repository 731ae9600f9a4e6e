"""The control exchange: hello, welcome, refused, go-away, ping. JSON where it is rare, fixed bytes where it is not."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from tunnel.errors import WireError
from tunnel.wire.frames import LINK_WINDOW, MAX_TEXT, PING_BODY, PONG_BODY, STREAM_WINDOW

LONGEST_DRAIN = 3600.0  #: seconds that an end waits for the other's last requests, whatever that has said
WORKERS = "workers"  #: capability: a link to each worker of a core
MAX_STREAMS = 1000  #: that an agent takes on one link if it does not say otherwise


class TunnelRequest(msgspec.Struct):
    """A tunnel an agent asks for. name: subdomain or full host name, "" to be given one; protocol: "http" or "tcp"."""

    name: str
    protocol: str = "http"
    local: str = ""  # what it forwards to, to be shown to operators


class Hello(msgspec.Struct):
    """The agent's first frame. versions: protocol versions it speaks, best first.

    instance: random, the same for all links of one agent; link: what tells those apart that it keeps side by side. A
    second link of the same instance and link supersedes the first. link_window: the largest that it takes, 0 for any.
    drain_timeout: seconds that its last requests get when it ends, None where it does not say.
    """

    versions: list[int]
    agent_version: str
    agent_id: str
    token: str
    tunnels: list[TunnelRequest]
    instance: str = ""
    max_streams: int = MAX_STREAMS
    capabilities: list[str] = []
    link: str = ""
    link_window: int = 0
    drain_timeout: float | None = None

    def __repr__(self) -> str:  # the token must never reach a log
        return f"Hello(agent_id={self.agent_id!r}, tunnels={self.tunnels!r})"


class TunnelGrant(msgspec.Struct):
    """A tunnel that is served now. Its place in Welcome.tunnels is its index in OPEN frames."""

    name: str
    protocol: str
    url: str


class Welcome(msgspec.Struct):
    """workers, worker: how many processes the core consists of, and which of them this link is at. core: the same for
    all workers of one run of a core. drain_timeout: as in the hello."""

    version: int
    core_version: str
    connection_id: str
    account_id: str
    agent_id: str
    tunnels: list[TunnelGrant]
    capabilities: list[str] = []
    stream_window: int = STREAM_WINDOW
    link_window: int = LINK_WINDOW
    workers: int = 1
    worker: int = 0
    core: str = ""
    drain_timeout: float | None = None


class RefusedMessage(msgspec.Struct):
    """Why the link is refused: a word of tunnel.errors.REFUSALS, a text for a person, seconds to wait (0: free)."""

    reason: str
    text: str
    retry_after: float = 0


T = TypeVar("T", Hello, Welcome, RefusedMessage)


def encode(message: Hello | Welcome | RefusedMessage) -> bytes:
    return msgspec.json.encode(message)


def decode(kind: type[T], payload: bytes) -> T:
    """Raises WireError when the payload is not such a message; the text never quotes it."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise WireError(f"a {kind.__name__} message could not be read") from None


def drain_seconds(told: float | None, ours: float) -> float:
    """How long the other end's last requests are waited for: as it says, within bounds, else as long as ours."""
    return ours if told is None else min(max(told, 0.0), LONGEST_DRAIN)


def pack_goaway(text: str) -> bytes:
    return text.encode()[:MAX_TEXT]


def pack_ping(token: int, wall_us: int) -> bytes:
    return PING_BODY.pack(token, wall_us)


def pack_pong(ping: bytes, wall_us: int) -> bytes:
    """The answer to a ping's payload. Raises WireError."""
    if len(ping) != PING_BODY.size:
        raise WireError("a PING frame has the wrong size")
    token, sent = PING_BODY.unpack(ping)
    return PONG_BODY.pack(token, sent, wall_us)


def unpack_pong(payload: bytes) -> tuple[int, int, int]:
    """(token, our wall clock at the ping, their wall clock), µs. Raises WireError."""
    if len(payload) != PONG_BODY.size:
        raise WireError("a PONG frame has the wrong size")
    token, sent, answered = PONG_BODY.unpack(payload)
    return token, sent, answered
