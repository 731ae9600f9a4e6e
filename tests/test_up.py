"""`tunnel up` without processes: its command line, the ports it takes, what it shows."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from rich.console import Console

from tunnel import __version__, screen, up
from tunnel.__main__ import main
from tunnel.config import load_agent, load_core
from tunnel.handler import RequestVisit
from tunnel.screen import Feed, LogLines, render, show_lines, show_time


def visit(path: str = "/", outcome: str = "ok", status: int = 200, error: str = "") -> RequestVisit:
    made = RequestVisit("127.0.0.1", "http")
    made.method, made.target, made.outcome, made.status, made.error = "GET", path, outcome, status, error
    return made


class Told(io.StringIO):
    """A text stream that tells the test, in Trio's thread, when a thread has flushed it."""

    def __init__(self) -> None:
        super().__init__()
        self._token = trio.lowlevel.current_trio_token()
        self._written = trio.Event()

    def flush(self) -> None:
        self._token.run_sync_soon(self._written.set)

    async def wait_for(self, text: str) -> str:
        with trio.fail_after(5):
            while text not in self.getvalue():
                await self._written.wait()
                self._written = trio.Event()
        return self.getvalue()


# Command line


@pytest.mark.parametrize("words", [[], ["up", "-nonsense"], ["up", "1", "2"], ["frob"], ["up", "-log-level=loud"]])
def test_a_wrong_command_line_ends_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "tunnel" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["70000"], "port"),
        (["a=1,a=2"], "twice"),
        (["ftp://x"], "http"),
        (["3000", "-subdomain=a_b"], "-subdomain"),
        (["-public-addr=here"], "-public-addr"),
        (["-subdomain"], "-subdomain"),
        (["3000", "-host-header=http://a"], "-host-header"),
    ],
)
def test_a_wrong_value_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tunnel up: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hlep"], "tunnel: 'hlep' is none of up, core, agent; did you mean help?"),
        (["frobnicate"], "tunnel: 'frobnicate' is none of up, core, agent; tunnel --help shows how"),
        (["account", "list"], "tunnel: account is a command of the core: tunnel core account ..."),
        (["3000"], "tunnel: to serve '3000' write: tunnel up 3000"),
        (["up", "-subdomian", "x"], "tunnel up: unknown flag -subdomian; did you mean -subdomain?"),
        (["up", "1", "2"], "tunnel up: unexpected argument '2'; python -m tunnel up -h shows how"),
        (["up", "-subdomain"], "tunnel up: -subdomain: the value is missing; python -m tunnel up -h shows how"),
        (["up", "-log-level=wraning"],
         "tunnel up: -log-level: 'wraning' is none of debug, info, warning, error; did you mean warning?"),
        (["up", "-sub", "x"], "tunnel up: unknown flag -sub; did you mean -subdomain?"),
        (["up", "--sub", "x"], "tunnel up: unknown flag -sub; did you mean -subdomain?"),
        (["core", "account", "limit", "a", "-name", "3"],
         "tunnel core: account limit: unknown flag -name; did you mean -names?"),
        (["core", "account"], "tunnel core: account: ACTION is missing; python -m tunnel.core account -h shows how"),
        (["core", "account", "lsit"],
         "tunnel core: account: ACTION: 'lsit' is none of create, list, show, limit, disable, enable, delete; "
         "did you mean list?"),
        (["core", "usage", "a", "b"],
         "tunnel core: usage: unexpected argument 'b'; python -m tunnel.core usage -h shows how"),
        (["core", "tunnel", "reserve"], "tunnel core: tunnel reserve: NAME and ACCOUNT are missing; "
         "python -m tunnel.core tunnel reserve -h shows how"),
        (["core", "token", "create", "a", "-expire=1d"],
         "tunnel core: token create: unknown flag -expire; did you mean -expires?"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line_that_says_what_to_do(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr() == ("", said + "\n")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-help", "-h", "help"):
        assert main([word]) == 0
        assert "tunnel up [PORT or URL]" in capsys.readouterr().out
    for word in ("--version", "version"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"tunnel {__version__}\n"
    with pytest.raises(SystemExit):
        main(["help", "agent"])
    assert "Usage: python -m tunnel.agent" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["up", "--help"])
    assert ended.value.code == 0
    assert "PORT or URL" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["core", "agent"])
def test_other_words_delegate(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([program, "--help"])
    assert ended.value.code == 0
    assert f"python -m tunnel.{program}" in capsys.readouterr().out


def test_one_dash_or_two() -> None:
    for words in (["-data-dir=d", "-subdomain", "s", "80"], ["--data-dir", "d", "--subdomain=s", "80"]):
        options = up.make_parser().parse_args(words)
        assert (options.data_dir, options.subdomain, options.local) == ("d", "s", "80")


# Settings and ports


def test_the_programs_take_the_settings(tmp_path: Path) -> None:
    core = load_core(up.core_flags("localhost:0", tmp_path), {})
    assert (core.agent_tls, core.data_dir, core.public_addr) == (False, str(tmp_path), "localhost:0")
    for address in (core.agent_addr, core.metrics_addr, core.dashboard_addr):
        assert address.startswith("127.0.0.1:")
    token = tmp_path / "token"
    token.write_text("tt_x\n")
    agent = load_agent(up.agent_flags("127.0.0.1:1", token, "db=tcp://localhost:5432", ""), {})
    assert (agent.tls, agent.token, agent.local) == (False, "tt_x", "db=tcp://localhost:5432")
    assert load_agent(up.agent_flags("127.0.0.1:1", token, "3000", "", "local"), {}).host_header == "local"


def test_a_port_in_use_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not up.is_free("127.0.0.1", port)
        assert not up.is_free("localhost", port)
        monkeypatch.setitem(up._PORTS, "public", port)
        assert up._address("public", "localhost") == "localhost:0"
    assert up.is_free("127.0.0.1", port)
    assert up._address("public") == f"127.0.0.1:{port}"


# Showing


async def test_a_request_is_a_line() -> None:
    feed, stream = Feed(), Told()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_lines, feed, stream)
        feed.add(visit("/a?secret=1"))
        feed.add(visit("/b", "local_refused", 502, "can't connect"))
        first, second = (await stream.wait_for("/b")).splitlines()
        assert " GET /a 200 ok " in first
        assert "secret" not in first
        assert " GET /b 502 local_refused " in second
        assert second.endswith("(can't connect)")
        turned_away = visit("/c", "quota", 429)
        turned_away.cause = "100 requests a second are used up"
        feed.add(turned_away)
        assert "429 quota" in (third := (await stream.wait_for("/c")).splitlines()[2])
        assert third.endswith("(100 requests a second are used up)")
        feed.add(visit("/last"))
        nursery.cancel_scope.cancel()
    assert " GET /last 200 ok " in stream.getvalue()


async def test_a_flood_is_counted_not_kept() -> None:
    feed, stream = Feed(), Told()
    for _ in range(5 * screen.PENDING):
        feed.add(visit())
    assert len(feed.pending) == screen.PENDING
    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_lines, feed, stream)
        lines = (await stream.wait_for("not shown")).splitlines()
        nursery.cancel_scope.cancel()
    assert len(lines) == screen.PENDING + 1
    assert lines[-1] == f"({4 * screen.PENDING} more not shown)"
    assert feed.total == 5 * screen.PENDING


async def test_nobody_reads_any_more() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    feed = Feed()
    with os.fdopen(os.dup(writing), "w") as stream:
        os.close(writing)
        feed.add(visit())
        await show_lines(feed, stream)  # returns, instead of raising
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is in the buffer still goes somewhere
    assert feed.total == 1


async def test_the_live_status() -> None:
    feed, stream = Feed(), Told()
    console = Console(file=stream, force_terminal=True, width=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(screen.show_live, feed, console)
        feed.add(visit("/[bold]x"))
        feed.say("a line above")
        await stream.wait_for("a line above")
        assert "GET /[bold]x" in await stream.wait_for("/[bold]x")
        nursery.cancel_scope.cancel()


def test_the_status_shows_counts_and_the_last_requests() -> None:
    feed = Feed()
    for number in range(30):
        feed.add(visit(f"/{number}" + "x" * 200, "no_agent" if number % 2 else "ok", 503 if number % 2 else 200))
    console = Console(file=io.StringIO(), width=90)
    with console.capture() as captured:
        console.print(render(feed))
    lines = captured.get().splitlines()
    assert "30 requests" in lines[1]
    assert "no_agent 15   ok 15" in lines[1]
    assert "p99" in lines[1]
    assert len(lines) == 2 + screen.RECENT + 1
    assert "/29x" in lines[2]
    assert all(len(line) <= 90 for line in lines)


async def test_log_lines_come_from_any_thread() -> None:
    feed = Feed()
    lines = LogLines(feed, trio.lowlevel.current_trio_token())
    await trio.to_thread.run_sync(lines.write, "one\ntwo\n")
    await feed.wait_changed()
    assert feed.take() == ["one", "two"]


def test_log_lines_after_the_run_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    async def make() -> LogLines:
        return LogLines(Feed(), trio.lowlevel.current_trio_token())

    trio.run(make).write("late\n")
    assert capsys.readouterr().err == "late\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.0031, "3.1ms"), (0.12, "120ms"), (1.204, "1.20s"), (0, "0.0ms")])
def test_times(seconds: float, text: str) -> None:
    assert show_time(seconds) == text


def test_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed()
    assert feed.quantile(0.99) == 0
    now: Callable[[], float] = lambda: 100.0  # noqa: E731  # its type is worth more than a def
    monkeypatch.setattr(screen, "monotonic", now)
    for number in range(100):
        one = visit()
        one.started = 100.0 - number / 1000
        feed.add(one)
    assert feed.quantile(0.5) == pytest.approx(0.050)
    assert feed.quantile(0.99) == pytest.approx(0.099)
