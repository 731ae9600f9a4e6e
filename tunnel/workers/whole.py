"""What a supervisor's pages need: its workers as plug-ins see them, their pages, and their checks made one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import trio

from tunnel.handler import Check, Offered, Page, PageAnswer, PageRequest, no_such_page
from tunnel.plugins import Program
from tunnel.workers.channel import ChannelLost
from tunnel.workers.crew import ASK_SECONDS, Crew
from tunnel.workers.details import Details, counts, together

Checks = Mapping[str, Mapping[str, Any]]  #: by name: {"ok": whether it holds, "reason": text}
Told = TypeVar("Told", bound="OfWorker")


class CrewView:
    """`tunnel.handler.Workers`. refresh: asks them anew for what the supervisor shows of them, and for what else they
    offer under these names."""

    def __init__(self, crew: Crew, refresh: Callable[..., Awaitable[None]]) -> None:
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
        await self._refresh(name)
        found = [
            Offered(worker.number, worker.key, worker.said[name]) for worker in self._crew.ready if name in worker.said
        ]
        return [*found, *self._crew.last_words(name)]

    async def refresh(self) -> None:
        await self._refresh()


class OfWorker(Protocol):
    """What a worker says of itself."""

    @property
    def checks(self) -> Checks: ...

    @property
    def details(self) -> Details: ...


class Whole(Generic[Told]):
    """The workers as one program. said: by number, what each that is ready has said last.

    part: under which name they say it, and `kind` what it is. retire: is given the last word of each that has ended.
    own: the supervisor's checks, in place of the workers' of the same names. is_ending: whether it is about to end,
    when nobody serves any more. alike: sections of the details that are of the same thing at each worker.
    """

    def __init__(
        self,
        program: Program,
        crew: Crew,
        part: str,
        kind: type[Told],
        retire: Callable[[Told], None],
        own: Mapping[str, Check] = MappingProxyType({}),
        is_ending: Callable[[], bool] = lambda: False,
        alike: Collection[str] = (),
    ) -> None:
        self.said: list[tuple[int, Told]] = []
        self._program, self._crew, self._part, self._retire = program, crew, part, retire
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._answering: set[int] = set()  # who serve, as far as one can see: one that stands still may not
        self._own, self._is_ending, self._alike = own, is_ending, alike
        self._gone: Details = {}  # counted by workers that have ended
        program.workers = CrewView(crew, self.refresh)
        program.checks.update(self._checks())
        program.with_workers = self._with_workers

    async def refresh(self, *names: str) -> None:
        """Ask them anew, for what they offer under these names too; what is said and the checks are of this moment
        then."""
        self._answering = {worker.number for worker in await self._crew.look([self._part, *names])}
        for word in self._crew.last_words(self._part):
            said = self._decoder.decode(word.data)
            self._gone = together([self._gone, counts(said.details)], self._alike)
            self._retire(said)
        self.said = [
            (worker.number, self._decoder.decode(worker.said[self._part]))
            for worker in self._crew.ready
            if self._part in worker.said
        ]
        self._program.checks.clear()
        self._program.checks.update(self._checks())

    def _with_workers(self, own: Details) -> Details:
        """The supervisor's details and its workers', as of their last word."""
        said = together((one.details for _, one in self.said), self._alike)
        gone = {name: section for name, section in self._gone.items() if name in said}
        return together([own, said, gone], self._alike)

    def _checks(self) -> dict[str, Check]:
        """Ready means: one of the workers is. What is not well with another shows in the reasons."""
        checks: dict[str, Check] = {**self._own, "workers": self._check_workers}
        said = [(number, one.checks) for number, one in self.said if number in self._answering]
        for name in dict.fromkeys(name for _, one in said for name in one):
            checks.setdefault(name, partial(unite, name, said))
        return checks

    def _check_workers(self) -> tuple[bool, str]:
        if self._is_ending():
            return False, "shutting down"
        answering = [one for number, one in self.said if number in self._answering]
        return any(is_ready(one.checks) for one in answering), f"{len(answering)} of {self._crew.count} workers serve"


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
            with trio.fail_after(ASK_SECONDS):
                answer = await chosen[0].channel.call("page", [request.path, request.query, request.headers])
        except (IndexError, ChannelLost, trio.TooSlowError):
            return PageAnswer(503, b"no such worker is there now\n")
        return PageAnswer(*answer) if answer else no_such_page(self)


def unite(name: str, said: Sequence[tuple[int, Checks]]) -> tuple[bool, str]:
    """A check of several workers, by number: it holds while it does for one of them. What is not well shows."""
    answers = [(number, checks[name]) for number, checks in said if name in checks]
    good = [check["reason"] for _, check in answers if check["ok"]]
    bad = [f"worker {number}: {check['reason']}" for number, check in answers if not check["ok"]]
    return bool(good), "; ".join([*good[:1], *bad])


def is_ready(checks: Checks) -> bool:
    return all(check["ok"] for check in checks.values())
