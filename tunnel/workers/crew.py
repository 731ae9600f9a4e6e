"""The supervisor's view: worker processes, started, watched, replaced, ended.

A worker is this program again, with its place in its environment (`VARIABLE`). Settings and sockets come over its
channel, so that all workers have the same, however late they start, and no secret stands on their command lines. The
life of each is one task:

1. start, send its orders, wait for "ready";
2. until it ends: its messages, its log, and a ping now and then; one that does not answer for HANG_SECONDS is killed;
3. it has ended: what it had is given up (`on_end`), and unless all are to end a new one takes its place, at once the
   first time, later and later if they end soon after they were ready, or can't be started (no room for files,
   processes).

A worker that ends before it is ready, in the first round, ends the program: its log says why.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import trio

from tunnel.errors import ConfigError
from tunnel.handler import Offered
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.workers.channel import Channel, ChannelLost, Handler
from tunnel.workers.lines import open_pipe, pass_on
from tunnel.workers.member import Place
from tunnel.workers.process import Worker, command, how_ended, open_process

log = get_logger("tunnel.workers")

START_SECONDS = 60.0  #: for a worker to get ready
PING_SECONDS = 2.0
HANG_SECONDS = 30.0  #: without an answer to a ping: twice the time after which its links are dead
ASK_SECONDS = 5.0  #: for a worker to do what it is asked for
MAX_WAIT = 10.0  #: seconds before one that ends again and again is started again
MAX_PAUSE = 0.2  #: between two looks whether its process has ended
MAX_WORDS = 100  #: last words that are kept for whoever asks
END_SECONDS = 10.0  #: that a worker has beyond the drain's deadline before it is killed; all its last steps fit


class Crew:
    """count workers of a module, which is a program as `python -m` knows it.

    orders: makes what a worker is told at its start, and the files that go with it (its own copies). handlers: makes
    the handlers of one worker's messages. on_ready, on_end: a worker has become ready, has ended.
    """

    def __init__(
        self,
        count: int,
        *,
        module: str,
        log_level: str,
        log_json: bool,
        orders: Callable[[Worker], tuple[Any, Sequence[int]]],
        handlers: Callable[[Worker], Mapping[str, Handler]],
        on_ready: Callable[[Worker], None] = lambda worker: None,
        on_end: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        self.count = count
        self._command = command(module)
        self.restarts = 0
        self.living: dict[int, Worker] = {}  # by number, ready or not
        self._last_words: dict[str, list[Offered]] = {}  # of those that have ended, by what they are about
        self.is_ending = False
        self.code = 0  # of a worker that gave up, which ends all
        self._log_level, self._log_json = log_level, log_json
        self._orders, self._handlers = orders, handlers
        self._on_ready, self._on_end = on_ready, on_end
        self._may_open = trio.Event()
        self._changed = trio.Event()
        self._turns = self._looks = 0

    # Asking -----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> list[Worker]:
        return [worker for _, worker in sorted(self.living.items()) if worker.is_ready]

    def get(self, number: int) -> Worker | None:
        """The worker of this number, if it is ready."""
        worker = self.living.get(number)
        return worker if worker is not None and worker.is_ready else None

    async def ask(self, name: str, message: Any = None) -> list[tuple[Worker, Any]]:
        """What the ready workers answer within ASK_SECONDS."""
        answers: list[tuple[Worker, Any]] = []

        async def ask_one(worker: Worker) -> None:
            with trio.move_on_after(ASK_SECONDS), suppress(ChannelLost):
                answers.append((worker, await worker.channel.call(name, message)))

        async with trio.open_nursery() as nursery:
            for worker in self.ready:
                nursery.start_soon(ask_one, worker)
        answers.sort(key=lambda answer: answer[0].number)
        return answers

    async def look(self, names: Sequence[str]) -> list[Worker]:
        """Ask the ready workers for what they offer under these names: it is in `said` then. Who has answered.

        One that says nothing for LOOK_SECONDS is as it was, and one that is known to be silent is not waited for.
        """
        self._looks += 1
        answered: list[Worker] = []

        async def look_at(worker: Worker, look: int) -> None:
            if await worker.look(look, names):
                answered.append(worker)

        async with trio.open_nursery() as nursery:
            for worker in self.ready:
                if not worker.is_silent:
                    nursery.start_soon(look_at, worker, self._looks)
        return answered

    def tell(self, name: str, message: Any = None, *, but: Worker | None = None) -> None:
        """Tell all living workers (those that start have had their orders, and hear it after them)."""
        for worker in self.living.values():
            if worker is not but:
                worker.channel.tell(name, message)

    def last_words(self, name: str) -> list[Offered]:
        """Of those that have ended since the last time."""
        return self._last_words.pop(name, [])

    async def wait_change(self) -> None:
        """Until a worker has become ready, has ended, or all are to end."""
        await self._changed.wait()

    async def wait_ready(self, number: int) -> Worker:
        """The worker of this number, when it is ready."""
        while (worker := self.get(number)) is None:
            await self._changed.wait()
        return worker

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # Life -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers until all have ended after `end`. Started once all are ready.

        Raises ConfigError when one ends before it is ready the first time.
        """
        async with open_pair() as nursery:
            async with open_pair() as starting:
                for number in range(self.count):
                    starting.start_soon(nursery.start, self._keep, number)
            task_status.started()

    def open(self) -> None:
        """Ready workers may go on with what they are there for, now and later."""
        self._may_open.set()

    def end(self) -> None:
        """No worker is replaced any more; that they end is for the caller to say to those that are ready.

        Those that only start have nothing to finish, and would not hear it yet.
        """
        self.is_ending = True
        for worker in self.living.values():
            if not worker.is_ready:
                worker.process.kill()
        self._note_change()

    async def wait_ended(self, seconds: float) -> None:
        """Until all have ended after `end`. They have so long to finish, and some more to end; then they are killed."""
        with trio.move_on_after(seconds + END_SECONDS) as scope:
            while self.living:
                await self._changed.wait()
        if scope.cancelled_caught:
            log.error("workers killed", error="they have not ended in time")
            for worker in self.living.values():
                worker.process.kill()

    async def _keep(self, number: int, *, task_status: trio.TaskStatus[None]) -> None:
        is_first = True
        failures = 0
        while not self.is_ending:
            try:
                worker, near = self._start(number)
            except OSError as exc:
                if is_first:
                    raise ConfigError(f"worker {number} can't be started: {exc.strerror}") from exc
                failures += 1
                wait = _wait(failures)
                log.error("worker can't be started", worker=number, wait=f"{wait:g}s", error=exc.strerror)
                await self._pause(wait)
                continue
            await self._live(worker, near, task_status if is_first else trio.TASK_STATUS_IGNORED)
            if is_first and not worker.is_ready and not self.is_ending:
                raise ConfigError(f"worker {number} ended with exit code {worker.code} while it started")
            is_first = False
            if self.is_ending:
                return
            failures = 0 if worker.has_served else failures + 1
            wait = _wait(failures) if failures > 1 else 0.0
            self.restarts += 1
            log.error("worker ended", worker=number, pid=worker.pid, wait=f"{wait:g}s", error=how_ended(worker.code))
            await self._pause(wait)

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while not self.is_ending:
                await self._changed.wait()

    async def _live(self, worker: Worker, near: int, task_status: trio.TaskStatus[None]) -> None:
        """One worker's life. Returns when its process is gone and all it has written is passed on."""
        number = worker.number
        self.living[number] = worker
        try:
            async with open_pair() as nursery:
                nursery.start_soon(pass_on, near, number, self._log_json)
                async with open_pair() as talking:
                    talking.start_soon(self._watch, worker, task_status)
                    await worker.channel.run()
                    talking.cancel_scope.cancel()
                await self._reap(worker)
        finally:
            if worker.code is None:
                worker.process.kill()
                worker.code = worker.process.wait()
            if self.living.get(number) is worker:
                del self.living[number]
            for name, data in {**worker.said, **(worker.last_words or {})}.items():
                words = self._last_words.setdefault(name, [])
                words.append(Offered(number, worker.key, data, is_last=True))
                del words[:-MAX_WORDS]
            self._on_end(worker)
            self._note_change()

    def _start(self, number: int) -> tuple[Worker, int]:
        """A worker, and where it writes to. Raises OSError; then nothing is left of it."""
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                near, far = open_pipe()
                undo.callback(os.close, near)
                try:
                    process = open_process(
                        self._command, Place(number, theirs.fileno(), self._log_level, self._log_json), far
                    )
                finally:
                    os.close(far)
            undo.callback(process.wait)
            undo.callback(process.kill)
            self._turns += 1
            worker = Worker(number, self._turns, process, Channel(ours, {}))
            worker.channel.handlers.update(
                {"ready": self._make_ready(worker), "parting": self._make_parting(worker), **self._handlers(worker)}
            )
            orders, files = self._orders(worker)
            worker.channel.tell("begin", orders, files)
            undo.pop_all()
        return worker, near

    def _make_ready(self, worker: Worker) -> Handler:
        async def ready(message: Any, files: list[int]) -> None:
            worker.ready_since = trio.current_time()
            self._on_ready(worker)
            self._note_change()
            await self._may_open.wait()

        return ready

    def _make_parting(self, worker: Worker) -> Handler:
        def parting(message: Any, files: list[int]) -> None:
            worker.last_words = message

        return parting

    async def _reap(self, worker: Worker) -> None:
        """Its channel has ended, so it is about to end: looked at now and then, which takes no thread for each. One
        that does not, whatever holds it, keeps its place from the next for HANG_SECONDS at most."""
        pause = 0.005
        with trio.move_on_after(HANG_SECONDS):
            while (code := worker.process.poll()) is None:
                await trio.sleep(pause)
                pause = min(MAX_PAUSE, 2 * pause)
            worker.code = code
            return
        log.error("worker killed", worker=worker.number, error=f"it has not ended within {HANG_SECONDS:g} s")
        worker.process.kill()
        worker.code = worker.process.wait()

    async def _watch(self, worker: Worker, task_status: trio.TaskStatus[None]) -> None:
        with trio.move_on_after(START_SECONDS) as scope:
            while not worker.is_ready:
                await self._changed.wait()
        if scope.cancelled_caught:
            log.error("worker killed", worker=worker.number, error=f"it was not ready within {START_SECONDS:g} s")
            worker.process.kill()
            return
        task_status.started()
        while True:
            await trio.sleep(PING_SECONDS)
            worker.pinged = trio.current_time()
            with trio.move_on_after(HANG_SECONDS) as scope, suppress(ChannelLost):
                await worker.channel.call("ping")
                worker.pinged = None
            if scope.cancelled_caught:
                log.error("worker killed", worker=worker.number, error=f"it has not answered for {HANG_SECONDS:g} s")
                worker.process.kill()
                return


def _wait(failures: int) -> float:
    return min(MAX_WAIT, 0.2 * 2.0**failures)
