"""What a plug-in is given: the program it is plugged into, its pages, its workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tunnel.handler.layers import Layer
from tunnel.handler.statistics import AgentStatistics, CoreStatistics


@dataclass(slots=True)
class PageRequest:
    """A GET on one of the program's own pages; header names lower case."""

    path: str
    query: str
    headers: dict[str, str]


@dataclass(slots=True)
class PageAnswer:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


Page = Callable[[PageRequest], Awaitable[PageAnswer]]


def no_such_page(pages: Mapping[str, Page]) -> PageAnswer:
    """The answer to a path that is none of these."""
    return PageAnswer(404, f"there is no such page; there are: {', '.join(sorted(pages))}\n".encode())


Check = Callable[[], tuple[bool, str]]  #: (holds, reason)


@dataclass(slots=True)
class AgentReport:
    """Metrics that an agent sent over its link: Prometheus text, and when it came (monotonic seconds)."""

    agent_id: str
    account_id: str
    text: bytes
    at: float
    connected: bool
    instance: str = ""  # tells agents of one name apart


@dataclass(slots=True)
class Offered:
    """What a worker said. key: tells the process from those before it in the same place; is_last: it has ended."""

    worker: int
    key: str
    data: bytes
    is_last: bool = False


class Workers(Protocol):
    """The worker processes of a program, as its supervisor's plug-ins see them."""

    @property
    def count(self) -> int:
        """How many there should be."""

    @property
    def restarts(self) -> int:
        """How many have ended and been replaced."""

    @property
    def keys(self) -> Sequence[str]:
        """Of those that are ready now."""

    async def ask(self, name: str) -> list[Offered]:
        """What is offered under this name by those that are ready, and the last word of each that has ended since the
        last call. Of one that does not answer within a second it is what it said before. Does what `refresh` does, too.
        """

    async def refresh(self) -> None:
        """Bring the supervisor's `statistics`, `reports`, `details` and `checks` up to date."""


class Tasks(Protocol):
    """A plug-in's own tasks. One that raises is reported and switches the plug-in off; the program goes on."""

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> None: ...

    async def start(self, async_fn: Callable[..., Awaitable[Any]], /, *args: Any, name: object = None) -> Any: ...


class Host(Protocol):
    """What a plug-in is given: the program it is plugged into."""

    @property
    def role(self) -> str:
        """ "core" or "agent"."""

    @property
    def version(self) -> str: ...

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The configuration by section ("metrics", "tracing", "log", …), as plain values."""

    @property
    def outcomes(self) -> Sequence[str]:
        """All outcome words."""

    @property
    def refusals(self) -> Sequence[str]:
        """All reasons for which a link is refused."""

    @property
    def checks(self) -> dict[str, Check]:
        """Readiness checks by name; all hold when the program may take traffic."""

    def statistics(self) -> CoreStatistics | AgentStatistics: ...

    def settle(self) -> None:
        """Let observers do now what they do `late`: what has ended is counted when this returns."""

    def take_round_trips(self) -> list[float]:
        """Heartbeat round trips (seconds) since the last call; bounded, oldest dropped."""

    def reports(self) -> list[AgentReport]:
        """Core: what agents reported over their links. Empty on an agent."""

    def set_report(self, make: Callable[[], bytes]) -> None:
        """Agent: what to send over the link every few seconds as this agent's metrics."""

    def add_page(self, path: str, page: Page) -> None:
        """Serve a page on the metrics address."""

    def offer(self, name: str, make: Callable[[], bytes]) -> None:
        """Where this program is one of several workers: what its part of a plug-in has to say to the supervisor's part
        when that asks, and once more at the end. The name is the plug-in's own, the bytes too."""

    @property
    def workers(self) -> Workers | None:
        """In a supervisor: its workers; None in a program that works itself."""

    def set_details(self, name: str, details: Callable[[], dict[str, Any]]) -> None:
        """Add a section to /health/detailed. With several workers those of one name are put together: numbers add up
        (tunnel/workers/details.py)."""

    def details(self) -> dict[str, dict[str, Any]]: ...

    @property
    def nursery(self) -> Tasks:
        """For a plug-in's own background tasks; cancelled when the program ends."""


PlugIn = Callable[[Host], AbstractAsyncContextManager[Layer]]
