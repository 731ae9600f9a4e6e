"""What a supervisor's pages need: its workers as plug-ins see them, their pages, and their checks made one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tunnel.handler import Offered, Page, PageAnswer, PageRequest
from tunnel.workers.channel import ChannelLost
from tunnel.workers.crew import Crew

Checks = Mapping[str, Mapping[str, Any]]  #: by name: {"ok": whether it holds, "reason": text}


class CrewView:
    """`tunnel.handler.Workers`. refresh: asks them anew for what the supervisor shows of them."""

    def __init__(self, crew: Crew, refresh: Callable[[], Awaitable[None]]) -> None:
        self._crew = crew
        self._refresh = refresh

    @property
    def count(self) -> int:
        return self._crew.count

    @property
    def restarts(self) -> int:
        return self._crew.restarts

    @property
    def keys(self) -> Sequence[str]:
        return [worker.key for worker in self._crew.ready]

    async def ask(self, name: str) -> list[Offered]:
        found = [
            Offered(worker.number, worker.key, offers[name])
            for worker, offers in await self._crew.ask("offers", [name])
            if name in offers
        ]
        return [*found, *self._crew.last_words(name)]

    async def refresh(self) -> None:
        await self._refresh()


class WorkerPages(dict[str, Page]):
    """The supervisor's own pages, and behind them those that only workers have: `?worker=1` says which is to answer,
    else it is the first."""

    def __init__(self, own: Mapping[str, Page], crew: Crew) -> None:
        super().__init__(own)
        self._crew = crew

    def get(self, path: str, default: Any = None) -> Any:
        page = super().get(path)
        return self._ask if page is None and path.startswith("/") else page

    async def _ask(self, request: PageRequest) -> PageAnswer:
        ready = self._crew.ready
        wanted = [part[7:] for part in request.query.split("&") if part.startswith("worker=")]
        chosen = [one for one in ready if not wanted or str(one.number) == wanted[0]]
        try:
            answer = await chosen[0].channel.call("page", [request.path, request.query, request.headers])
        except (IndexError, ChannelLost):
            return PageAnswer(503, b"no such worker is there now\n")
        return PageAnswer(*answer) if answer else PageAnswer(404, b"there is no such page\n")


def unite(name: str, said: Sequence[tuple[int, Checks]]) -> tuple[bool, str]:
    """A check of several workers, by number: it holds while it does for one of them. What is not well shows."""
    answers = [(number, checks[name]) for number, checks in said if name in checks]
    good = [check["reason"] for _, check in answers if check["ok"]]
    bad = [f"worker {number}: {check['reason']}" for number, check in answers if not check["ok"]]
    return bool(good), "; ".join([*good[:1], *bad])


def is_ready(checks: Checks) -> bool:
    return all(check["ok"] for check in checks.values())
