"""The table of odd requests (tests/framing/requestcases.py), each as raw bytes through a real core and agent.

A service on raw sockets records what arrives and takes the canonical form only. Behind each case another request is
sent: it must arrive as itself when the connection goes on, and not at all when it ends.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from framing.origin import Arrived, Origin
from framing.requestcases import CASES, Case, Passed
from running import RunningAgent, RunningCore, poll
from visiting import Broken, Connection

pytestmark = pytest.mark.system

NEXT = b"GET /next HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
#: what the core and its tracing layer add
OURS = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-request-id", b"traceparent",
        b"tracestate", b"baggage")  # fmt: skip
CHECKED = {"X-Forwarded-For": b"127.0.0.1", "X-Forwarded-Proto": b"http"}


class Setup:
    def __init__(self, core: RunningCore, origin: Origin) -> None:
        self.core = core
        self.origin = origin
        self.may_break_off = 0  # requests that may have begun to arrive, also when the next case runs already


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with ExitStack() as stack:
        origin = Origin()
        stack.callback(origin.close)
        core = RunningCore(tmp_path_factory.mktemp("framing") / "core", "-agent-tls=false")
        stack.callback(core.close)
        agent = RunningAgent(core, origin.url, "-subdomain=app")
        stack.callback(agent.close)
        yield Setup(core, origin)


def answers(visitor: Connection, case: Case) -> list[tuple[int, str, bool]]:
    """(status, outcome, whether it says close) of every answer until the connection ends or /next is answered."""
    got = []
    for number in range(len(case.passed) + 2):
        method = case.passed[number].first.partition(b" ")[0].decode() if number < len(case.passed) else "GET"
        try:
            answer = visitor.read(method)
        except Broken:
            break
        got.append((answer.status, answer.outcome, answer["connection"] == "close"))
        if got[-1][2]:
            break
        if number == len(case.passed) and not case.closes:
            break
    return got


def form(arrived: Arrived) -> Passed:
    """As the table writes it: without what is ours, which must be there once and say the truth."""
    fields, ours, host = [], [], b""
    for line in arrived.fields:
        name, _, value = line.partition(b": ")
        if name.lower() == b"host":
            assert not host
            host = value
        elif name.lower() in OURS:
            ours.append((name.decode(), value))
        else:
            fields.append(line)
    assert len({name.lower() for name, _ in ours}) == len(ours)
    assert {name: value for name, value in ours if name in CHECKED} == CHECKED
    return Passed(arrived.first, tuple(fields), arrived.framing, arrived.body, arrived.trailers, host)


def check(setup: Setup, case: Case, size: int) -> None:
    """Send the case in pieces of this size."""
    origin = setup.origin
    before = len(origin.requests)
    with Connection(setup.core.public, "app.localhost") as visitor:
        raw = case.raw + NEXT * case.followed
        for at in range(0, len(raw), size):
            visitor.send(raw[at : at + size])
        got = answers(visitor, case)
        if case.closes:
            assert got[-1][2] and visitor.ends() in ("closed", "reset")
    expected = list(case.passed) + ([] if case.closes else [Passed(b"GET /next HTTP/1.1")])
    refused = case.status != 200
    assert [status for status, _, _ in got] == [200] * len(expected) + [case.status] * refused
    assert not refused or got[-1][1] != ""
    setup.may_break_off += case.partial
    assert [form(one) for one in origin.requests[before:] if one.whole] == expected
    assert len([one for one in origin.requests if not one.whole]) <= setup.may_break_off
    assert origin.violations == []


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case(setup: Setup, case: Case) -> None:
    check(setup, case, len(case.raw) + len(NEXT))


def test_the_same_in_pieces(setup: Setup) -> None:
    """Byte by byte; long ones in forty pieces. What is decided early is decided alike."""
    failed = {}
    for case in CASES:
        if not case.together:
            try:
                check(setup, case, max(1, len(case.raw) // 40) if len(case.raw) > 300 else 1)
            except (AssertionError, OSError) as exc:
                failed[case.name] = repr(exc)[:300]
    assert failed == {}


def test_nothing_came_that_no_case_explains(setup: Setup) -> None:
    """Also not late."""
    origin = setup.origin
    with Connection(setup.core.public, "app.localhost") as visitor:
        assert visitor.ask("GET /last").status == 200
    poll(lambda: origin.requests[-1].first == b"GET /last HTTP/1.1", "the last request has arrived")
    whole = [one.first for one in origin.requests if one.whole]
    assert len(whole) <= 2 * sum(len(case.passed) + (not case.closes) for case in CASES) + 1
    assert whole.count(b"GET /next HTTP/1.1") <= 2 * sum(not case.closes for case in CASES)
    assert origin.violations == []
