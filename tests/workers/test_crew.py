"""The life of workers, with processes that do no more than say that they are ready and answer."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from scarcity import open_files, room_below

from observability.export import STOP_SECONDS
from observability.logqueue import JOIN
from tunnel.agent.farewell import PARTING
from tunnel.core.draining import CUT_OFF_TIME, PARTING_TIME
from tunnel.core.storing import CLOSE_TIME, LEAST_WRITES
from tunnel.workers import VARIABLE, process
from tunnel.workers import crew as crews
from tunnel.workers.channel import Channel
from tunnel.workers.crew import END_SECONDS, Crew
from tunnel.workers.member import LAST_WORDS_SECONDS
from tunnel.workers.process import Worker

WORKER = f'''
import json, os, socket, struct, sys
HEADER = struct.Struct("!IIBB")
sock = socket.socket(fileno=json.loads(os.environ["{VARIABLE}"])["channel"])
sock.sendall(HEADER.pack(8, 1, 0, 0) + b"\\x92\\xa5ready\\xc0")  # a call: ready
buffer = b""
while data := sock.recv(65536):
    buffer += data
    while len(buffer) >= 10 and len(buffer) >= 10 + HEADER.unpack_from(buffer)[0]:
        length, serial, what, _ = HEADER.unpack_from(buffer)
        buffer = buffer[10 + length :]
        if serial and what == 0:
            sock.sendall(HEADER.pack(9, serial, 1, 0) + b"\\x81\\xa4part\\xc4\\x01x")
'''


def make_crew(count: int, **options: Any) -> Crew:
    options = {"orders": lambda worker: (None, ()), "handlers": lambda worker: {}, **options}
    crew = Crew(count, module="none", log_level="info", log_json=False, **options)
    crew._command = [sys.executable, "-S", "-E", "-c", WORKER]
    return crew


@asynccontextmanager
async def running(crew: Crew) -> AsyncIterator[None]:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(crew.run)
            crew.open()
            yield
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - it happens outside of Trio
        await trio.sleep(0.01)


async def replaced(crew: Crew, number: int) -> None:
    was = crew.living[number]
    os.kill(was.pid, signal.SIGKILL)
    await until(lambda: crew.get(number) not in (None, was))


async def test_a_worker_that_ends_is_replaced_however_many_there_are() -> None:
    """None of them keeps one of Trio's threads busy."""
    threads = trio.to_thread.current_default_thread_limiter()
    threads.total_tokens = 2
    crew = make_crew(4)
    async with running(crew):
        assert [worker.number for worker in crew.ready] == [0, 1, 2, 3]
        for number in range(4):
            await replaced(crew, number)
        assert crew.restarts == 4
        await trio.to_thread.run_sync(lambda: None)


async def test_one_that_says_no_more_and_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "HANG_SECONDS", 0.3)
    crew = make_crew(1)
    async with running(crew):
        was = crew.living[0]
        monkeypatch.setattr(was.process, "poll", lambda: None)  # its channel ends with it, but it seems to go on
        os.kill(was.pid, signal.SIGKILL)
        await until(lambda: crew.get(0) not in (None, was))
    assert [one.getMessage() for one in caplog.records] == ["worker killed", "worker ended"]


async def test_one_that_ends_soon_is_waited_for_longer_however_long_its_start_took(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Starts are slow where the machine is busy, and workers that end again and again make it busier."""
    monkeypatch.setattr(process, "GOOD_SECONDS", 0.4)
    crew = make_crew(1)
    crew._command[-1] = "import time; time.sleep(0.5)" + WORKER
    async with running(crew):
        for turn in range(1, 4):
            await until(lambda: crew.get(0) is not None)
            os.kill(crew.living[0].pid, signal.SIGKILL)
            await until(lambda turn=turn: len(caplog.records) == turn)  # type: ignore[misc]
    waits = [record.fields["wait"] for record in caplog.records]  # type: ignore[attr-defined]
    assert waits == ["0s", "0.8s", "1.6s"]


async def test_a_replacement_that_can_not_be_started_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    crew = make_crew(2)
    async with running(crew):
        was = crew.living[1]
        with room_below(3):
            os.kill(was.pid, signal.SIGKILL)
            await until(lambda: [one.getMessage() for one in caplog.records].count("worker can't be started") == 2)
        assert [worker.number for worker in crew.ready] == [0]
        await until(lambda: crew.get(1) is not None)
        assert crew.restarts == 1


async def test_a_start_that_fails_leaves_nothing_open() -> None:
    """With room for no file, for one, for two, … until it is enough."""
    crew = make_crew(1)
    before = open_files()
    failures = 0
    for limit in range(3, 200):
        try:
            with room_below(limit):
                worker, near = crew._start(0)
        except OSError:
            failures += 1
            assert open_files() == before
        else:
            break
    assert failures >= 6
    os.close(near)
    worker.channel.close()
    worker.process.kill()
    worker.process.wait()
    assert open_files() == before


async def test_a_process_whose_orders_can_not_be_made_is_ended() -> None:
    def orders(worker: Any) -> Any:
        started.append(worker.process)
        raise OSError(24, "Too many open files")

    started: list[Any] = []
    before = open_files()
    with pytest.raises(OSError, match="Too many"):
        make_crew(1, orders=orders)._start(0)
    assert started[0].returncode == -signal.SIGKILL
    assert open_files() == before


# What workers say -------------------------------------------------------------------------------------------------


async def test_one_that_stands_still_is_waited_for_once_and_then_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "PING_SECONDS", 0.05)
    monkeypatch.setattr(process, "LOOK_SECONDS", 0.5)
    crew = make_crew(2)
    async with running(crew):
        assert {worker.number for worker in await crew.look(["part"])} == {0, 1}
        assert [worker.said for worker in crew.ready] == [{"part": b"x"}] * 2
        one = crew.living[1]
        os.kill(one.pid, signal.SIGSTOP)
        began = trio.current_time()
        assert [worker.number for worker in await crew.look(["part"])] == [0]
        assert 0.4 < trio.current_time() - began < 2
        await until(lambda: one.is_silent)
        began = trio.current_time()
        assert [worker.number for worker in await crew.look(["part"])] == [0]
        assert trio.current_time() - began < 0.4
        assert one.said == {"part": b"x"}  # its last word
        os.kill(one.pid, signal.SIGCONT)
        await until(lambda: not one.is_silent)
        assert {worker.number for worker in await crew.look(["part"])} == {0, 1}


async def test_what_a_killed_worker_said_last_is_its_last_word() -> None:
    crew = make_crew(2)
    async with running(crew):
        await crew.look(["part"])
        key = crew.living[1].key
        await replaced(crew, 1)
        assert [(word.worker, word.key, word.data, word.is_last) for word in crew.last_words("part")] == [
            (1, key, b"x", True)
        ]
        assert crew.last_words("part") == []


async def test_an_older_answer_replaces_no_newer_one() -> None:
    ours, theirs = socket.socketpair()
    worker = Worker(0, 1, None, Channel(ours, {}))  # type: ignore[arg-type]  # no process
    worker.hear(2, {"metrics": b"two"})
    worker.hear(1, {"metrics": b"one", "core": b"one"})
    assert worker.said == {"metrics": b"two", "core": b"one"}
    worker.channel.close()
    theirs.close()


def test_a_worker_that_needs_all_of_its_time_to_end_is_not_killed() -> None:
    """Beyond the drain's deadline it may take as long as each of its last steps, whatever hangs: requests that are cut
    off, links that close, the store's last writes and its close, the exporters, and its last words."""
    both = STOP_SECONDS + JOIN + LAST_WORDS_SECONDS
    core = CUT_OFF_TIME + PARTING_TIME + LEAST_WRITES + CLOSE_TIME + both
    assert max(core, PARTING + both) + 1 < END_SECONDS
