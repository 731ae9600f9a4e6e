"""The limit of open files is raised as far as it can be; where that does not reach, one line says what would."""

from __future__ import annotations

import resource
import sys

import pytest

from tunnel import openfiles
from tunnel.agent import places
from tunnel.config import CoreSettings
from tunnel.core.capacity import make_room_for_files
from tunnel.log import get_logger

log = get_logger("tunnel.test")


class System:
    """Its limits of a process. ceiling: beyond what the hard limit says (macOS has one)."""

    RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY

    def __init__(self, soft: int, hard: int, ceiling: int = sys.maxsize) -> None:
        self.limits = soft, hard
        self.ceiling = ceiling

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        soft, hard = limits
        assert which == self.RLIMIT_NOFILE and hard == self.limits[1]
        assert soft > self.limits[0] != self.RLIM_INFINITY, "lowered"
        if soft > self.ceiling or (hard != self.RLIM_INFINITY and soft > hard):
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


NONE = resource.RLIM_INFINITY
MUCH = 1_048_576


@pytest.mark.parametrize(
    ("system", "before", "allowed"),
    [
        (System(1024, 524_288), 1024, 524_288),
        (System(1024, 1_000_000_000), 1024, MUCH),
        (System(1024, NONE), 1024, MUCH),
        (System(256, NONE, ceiling=245_760), 256, 65_536),
        (System(256, NONE, ceiling=24_576), 256, 24_576),
        (System(256, NONE, ceiling=12_000), 256, 10_240),
        (System(256, NONE, ceiling=1000), 256, 256),
        (System(20_000, NONE, ceiling=24_000), 20_000, 20_000),
        (System(4096, 4096), 4096, 4096),
        (System(1024, 2000), 1024, 2000),
        (System(2_000_000, 2_000_000), 2_000_000, 2_000_000),
        (System(NONE, NONE), sys.maxsize, sys.maxsize),
    ],
    ids=lambda value: str(value.limits) if isinstance(value, System) else "",
)
def test_it_is_raised_as_far_as_it_goes(
    system: System, before: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openfiles, "resource", system)
    assert openfiles.raise_limit() == (before, allowed)
    if before != sys.maxsize:
        assert system.limits[0] == allowed


def said(system: System, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **settings: int) -> object:
    """What the log is told of a core's settings: the fields of its warning, None where there is none."""
    monkeypatch.setattr(openfiles, "resource", system)
    caplog.set_level("DEBUG", "tunnel.test")
    caplog.clear()
    make_room_for_files(CoreSettings(**settings), log)
    found = [one.fields for one in caplog.records if one.levelname == "WARNING"]  # type: ignore[attr-defined]
    assert len(found) <= 1
    return found[0] if found else None


def test_what_does_not_fit_is_said_with_what_would(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(System(1024, 65_536), monkeypatch, caplog) is None
    assert [(one.levelname, one.fields) for one in caplog.records] == [  # type: ignore[attr-defined]
        ("DEBUG", {"allowed": 65_536, "before": 1024})
    ]
    fields = said(System(1024, 4096), monkeypatch, caplog)
    assert isinstance(fields, dict)
    # 10,000 visitors, 1,000 agents, 1,000 that attach, 600 of its own
    assert (fields["allowed"], fields["needed"]) == (4096, 12_600)
    assert fields["advice"].endswith("or set -max-visitors=1496")
    assert said(System(1024, 4096), monkeypatch, caplog, max_visitors=1496) is None
    fields = said(System(1024, 1024), monkeypatch, caplog)
    assert isinstance(fields, dict)
    assert fields["advice"].endswith("set lower limits of -max-connections and -max-attaching, then of -max-visitors")


def test_an_agent_says_how_many_requests_it_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for limit, told in ((1300, None), (1299, 999), (100, 1)):
        monkeypatch.setattr(openfiles, "resource", System(limit, limit))
        assert openfiles.allowed_now() == limit
        caplog.clear()
        places.make_room_for_files(log)
        found = [one.fields for one in caplog.records if one.levelname == "WARNING"]  # type: ignore[attr-defined]
        assert len(found) == (told is not None)
        if told is not None:
            assert (found[0]["allowed"], found[0]["needed"]) == (limit, 1300)
            assert found[0]["advice"].endswith(f"this one takes {told} requests at a time, and tells the core so")
            assert places.Places([]).share(1) == told
    monkeypatch.setattr(openfiles, "resource", System(NONE, NONE))
    assert openfiles.allowed_now() == sys.maxsize and places.Places([]).share(256) == 1000


def test_each_worker_needs_its_part(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert said(System(1024, 4350), monkeypatch, caplog, workers=4) is None  # 2,500 + 1,000 + 250 + 600
    fields = said(System(1024, 4349), monkeypatch, caplog, workers=4)
    assert isinstance(fields, dict)
    assert (fields["needed"], fields["advice"].rpartition(" ")[2]) == (4350, "-max-visitors=9996")


def test_any_number_of_visitors_asks_for_room_for_agents(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(System(1024, 2600), monkeypatch, caplog, max_visitors=0) is None
    fields = said(System(1024, 2599), monkeypatch, caplog, max_visitors=0)
    assert isinstance(fields, dict)
    assert "lower limits of -max-connections" in fields["advice"]
