"""The table of broken local services (tests/framing/answers.py) behind a real agent and core.

The visitor gets our 502 or 504, or an answer that visibly breaks off, and after each case the next request is clean:
on the visitor's connection if that goes on, and at the service on a connection that is as it should be.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from framing.answers import BAD_GATEWAY, BROKEN, CASES, EITHER, LATE, SILENCE, TIMEOUT, Case
from framing.brokenservice import PATIENCE, BrokenService
from running import RunningAgent, RunningCore
from visiting import Answer, Broken, Connection

pytestmark = pytest.mark.system

NUMBERED = list(enumerate(CASES))
PROMPT = [(number, case) for number, case in NUMBERED if SILENCE not in case.steps]
SILENT = [(number, case) for number, case in NUMBERED if SILENCE in case.steps]


class Setup:
    def __init__(self, core: RunningCore, service: BrokenService) -> None:
        self.core = core
        self.service = service

    def connect(self) -> Connection:
        return Connection(self.core.public, "app.localhost")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with ExitStack() as stack:
        service = BrokenService(CASES)
        stack.callback(service.close)
        core = RunningCore(
            tmp_path_factory.mktemp("broken") / "core", "-agent-tls=false", "-request-timeout=1500ms",
            "-body-idle-timeout=1500ms",
        )  # fmt: skip
        stack.callback(core.close)
        agent = RunningAgent(core, service.url, "-subdomain=app", "-request-timeout=1s")
        stack.callback(agent.close)
        yield Setup(core, service)


def outcome_of(visitor: Connection, number: int, case: Case) -> tuple[str | tuple[int, bytes], Answer | None]:
    visitor.send(visitor.request(f"{case.line} /case/{number}", *case.fields, body=case.body))
    try:
        answer = visitor.read(case.line)
    except Broken:
        return BROKEN, None
    if answer.outcome:
        return f"{answer.status} {answer.outcome}", answer
    assert answer["x-request-id"] != "forged"
    return (answer.status, answer.body), answer


def check(setup: Setup, number: int, case: Case) -> None:
    service = setup.service
    with setup.connect() as visitor:
        got, answer = outcome_of(visitor, number, case)
        if case.expected == EITHER:
            assert got in (BAD_GATEWAY, BROKEN)
        else:
            assert got == case.expected
        if LATE in case.steps:
            service.has_answer[number].set()
            assert service.has_sent_late[number].wait(PATIENCE)
        goes_on = answer is not None and answer["connection"] == ""
        if goes_on:
            assert visitor.ask(f"GET /ok/same/{number}").body == f"/ok/same/{number}".encode()
        else:
            assert visitor.ends() in ("closed", "reset")
    with setup.connect() as visitor:
        assert visitor.ask(f"GET /ok/new/{number}").body == f"/ok/new/{number}".encode()
    if case.dirty:
        mine = service.served[f"/case/{number}"]
        assert mine not in (service.served[f"/ok/new/{number}"], service.served.get(f"/ok/same/{number}"))


@pytest.mark.parametrize(("number", "case"), PROMPT, ids=[case.name for _, case in PROMPT])
def test_a_case(setup: Setup, number: int, case: Case) -> None:
    check(setup, number, case)


def test_silence_at_each_stage(setup: Setup) -> None:
    """All at once: each lasts a time-out."""
    assert {case.expected for _, case in SILENT} == {TIMEOUT, BROKEN}
    with ThreadPoolExecutor(len(SILENT)) as pool:
        checks = {case.name: pool.submit(check, setup, number, case) for number, case in SILENT}
    failed = {name: repr(done.exception()) for name, done in checks.items() if done.exception() is not None}
    assert failed == {}
