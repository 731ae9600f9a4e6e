"""What agents report: our own text passes unchanged, and nothing hostile comes through."""

from __future__ import annotations

import re
import time

import pytest
import trio
from fakehost import FakeHost
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability import metrics, reports
from observability.agent_metrics import FAMILIES, AgentMetrics
from observability.reports import AgentBook, make_report, parse_report
from tunnel.config.options import program
from tunnel.handler import AgentReport, ConnectVisit, LinkVisit, LocalVisit, PageRequest, StreamVisit, Visit

ASK = "application/openmetrics-text; version=1.0.0"
DAY = 24 * 3600.0

Numbers = dict[tuple[str, ...], float]


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core() -> FakeHost:
    return FakeHost()


@pytest.fixture
def book(core: FakeHost, clock: Clock) -> AgentBook:
    return AgentBook(core, clock)


async def text_of(book: AgentBook, accept: str = "") -> str:
    return (await book.page(PageRequest("/metrics/agents", "", {"accept": accept}))).body.decode()


async def read(book: AgentBook) -> Numbers:
    """Samples by (name, account, agent[, le]). Both formats must say the same."""
    text, openmetrics = await text_of(book), await text_of(book, ASK)
    numbers: Numbers = {}
    for metric in parse_text(text):
        for sample in metric.samples:
            assert set(sample.labels) <= {"account_id", "agent_id", "le"}
            key = (sample.name, *sample.labels.values())
            assert key not in numbers
            numbers[key] = sample.value
    assert numbers == {
        (sample.name, *sample.labels.values()): sample.value
        for metric in parse_openmetrics(openmetrics)  # type: ignore[no-untyped-call]
        for sample in metric.samples
    }
    return numbers


async def own_report(requests: int = 3) -> bytes:
    agent = AgentMetrics(FakeHost("agent"))

    async def handler(visit: Visit) -> None:
        visit.outcome, visit.status = "ok", 200

    handle = agent.layer(handler)
    for _ in range(requests):
        stream = StreamVisit(None, "http")
        stream.sampled, stream.trace_id = True, "ab" * 16
        await handle(LocalVisit(stream, "localhost:3000", "http"))
        await handle(stream)
    return make_report(agent.collect())


def link(core: FakeHost, book: AgentBook, agent: str = "agent-1", account: str = "acme") -> LinkVisit:
    connect = ConnectVisit("192.0.2.1:1", f"c-{account}-{agent}")
    connect.agent_id, connect.account_id = agent, account
    visit = LinkVisit(connect)
    core.add_link(visit.connection_id, account, agent)
    book.link_began(visit)
    return visit


def unlink(core: FakeHost, book: AgentBook, visit: LinkVisit) -> None:
    core.core.links = [known for known in core.core.links if known.connection_id != visit.connection_id]
    book.link_ended(visit)


# Reports of our own ----------------------------------------------------------------------------------------------


async def test_our_own_report_passes_whole(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    link(core, book)
    text = await own_report()
    assert len(text) < reports.MAX_BYTES / 4
    core.agent_reports = [AgentReport("agent-1", "acme", text, clock.now, True)]
    numbers = await read(book)
    sent = {
        (sample.name, "acme", "agent-1", *sample.labels.values()): sample.value
        for metric in parse_text(text.decode())
        for sample in metric.samples
        if sample.name != "agent_connection_active"
    }
    assert len(sent) > 60
    assert numbers == {**sent, ("agent_connection_active", "acme", "agent-1"): 1}
    assert numbers["agent_requests_success", "acme", "agent-1"] == 3


async def test_types_and_order_are_the_tables(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    for agent in ("a", "b"):
        link(core, book, agent)
        core.agent_reports.append(AgentReport(agent, "acme", await own_report(), clock.now, True))
    text = await text_of(book)
    assert re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) == list(FAMILIES)
    types = {metric.name: metric.type for metric in parse_openmetrics(await text_of(book, ASK))}  # type: ignore[no-untyped-call]
    assert types["agent_requests"] == "counter"
    assert types["agent_requests_success"] == "unknown"
    assert types["agent_heartbeat_rtt_seconds"] == "histogram"


async def test_a_report_holds_only_what_is_listed_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await own_report()
    names = {sample.name for metric in parse_text(text.decode()) for sample in metric.samples}
    assert all(name.startswith("agent_") for name in names)
    monkeypatch.setattr(reports, "MAX_BYTES", 1000)
    small = await own_report()
    assert 0 < len(small) <= 1000


async def test_the_plugin_reports_and_serves() -> None:
    async with trio.open_nursery() as nursery:
        agent, core = FakeHost("agent", nursery=nursery), FakeHost(nursery=nursery)
        async with metrics.plugin(agent), metrics.plugin(core) as layer:
            assert agent.report is not None
            assert "/metrics/agents" not in agent.pages
            core.agent_reports = [AgentReport("agent-1", "acme", agent.report(), time.monotonic(), True)]
            body = (await core.get("/metrics/agents")).body
            assert b'agent_requests_total{account_id="acme",agent_id="agent-1"} 0.0\n' in body

            async def handler(visit: Visit) -> None:
                pass

            connect = ConnectVisit("192.0.2.1:1", "c1")
            connect.agent_id, connect.account_id = "agent-2", "acme"
            await layer(handler)(LinkVisit(connect))
            body = (await core.get("/metrics/agents")).body
            assert b'agent_connection_active{account_id="acme",agent_id="agent-2"} 0.0\n' in body


# Who is there and who has gone -----------------------------------------------------------------------------------


async def test_a_linked_agent_without_a_report_is_listed(core: FakeHost, book: AgentBook) -> None:
    link(core, book)
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 1}


async def test_an_agent_that_has_gone_is_listed_for_a_day(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    visit = link(core, book)
    core.agent_reports = [AgentReport("agent-1", "acme", await own_report(), clock.now, True)]
    assert len(await read(book)) > 60
    core.agent_reports = []
    unlink(core, book, visit)
    gone = {("agent_connection_active", "acme", "agent-1"): 0.0}
    assert await read(book) == gone
    clock.now += DAY - 1
    assert await read(book) == gone
    clock.now += 2
    assert await read(book) == {}


async def test_gone_without_any_scrape_before(core: FakeHost, book: AgentBook) -> None:
    unlink(core, book, link(core, book))
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 0}


async def test_gone_seen_by_scrapes_alone(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    """Also with the layer switched off: the statistics tell."""
    core.add_link("c1")
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 1}
    core.core.links.clear()
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 0}
    clock.now += DAY + 1
    assert await read(book) == {}


async def test_back_again(core: FakeHost, book: AgentBook) -> None:
    unlink(core, book, link(core, book))
    link(core, book)
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 1}


async def test_one_of_two_links_gone(core: FakeHost, book: AgentBook) -> None:
    link(core, book)
    core.add_link("second")
    connect = ConnectVisit("192.0.2.1:1", "second")
    connect.agent_id, connect.account_id = "agent-1", "acme"
    core.core.links.pop()
    book.link_ended(LinkVisit(connect))
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 1}


async def test_the_hosts_old_reports_do_not_prolong_the_day(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    core.agent_reports = [AgentReport("agent-1", "acme", await own_report(), clock.now, False)]
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 0}
    clock.now += DAY + 1
    assert await read(book) == {}
    assert await read(book) == {}


async def test_an_old_report_of_a_linked_agent_is_not_shown(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    link(core, book)
    core.agent_reports = [AgentReport("agent-1", "acme", await own_report(), clock.now, True)]
    clock.now += reports.STALE_SECONDS + 1
    assert await read(book) == {("agent_connection_active", "acme", "agent-1"): 1}


async def test_the_newest_report_counts(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    link(core, book)
    for at, requests in ((clock.now - 1, 1), (clock.now, 2), (clock.now - 2, 5)):
        core.agent_reports.append(AgentReport("agent-1", "acme", await own_report(requests), at, True))
    assert (await read(book))["agent_requests_total", "acme", "agent-1"] == 2
    core.agent_reports = [AgentReport("agent-1", "acme", await own_report(7), clock.now + 1, True)]
    assert (await read(book))["agent_requests_total", "acme", "agent-1"] == 7


async def test_those_gone_are_bounded(core: FakeHost, book: AgentBook, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that makes up names pushes out its own, the oldest first."""
    monkeypatch.setattr(reports, "MAX_GONE_BY_ACCOUNT", 5)
    monkeypatch.setattr(reports, "MAX_GONE", 12)
    unlink(core, book, link(core, book, "honest", "other"))
    for number in range(50):
        unlink(core, book, link(core, book, f"agent-{number}"))
    numbers = await read(book)
    assert set(numbers) == {
        ("agent_connection_active", "other", "honest"),
        *(("agent_connection_active", "acme", f"agent-{number}") for number in range(45, 50)),
    }
    for number in range(50):
        unlink(core, book, link(core, book, "agent", f"account-{number}"))
    assert len(await read(book)) == 12


async def test_nothing_to_show(book: AgentBook) -> None:
    assert await text_of(book) == ""
    assert await text_of(book, ASK) == "# EOF\n"


# Hostile agents --------------------------------------------------------------------------------------------------

HISTOGRAM = b"""agent_heartbeat_rtt_seconds_bucket{le="1.0"} 1.0
agent_heartbeat_rtt_seconds_bucket{le="+Inf"} 2.0
agent_heartbeat_rtt_seconds_count 2.0
agent_heartbeat_rtt_seconds_sum 3.0
"""


def test_a_small_whole_histogram_is_taken() -> None:
    assert parse_report(HISTOGRAM) == {
        "agent_heartbeat_rtt_seconds": [
            ("_bucket", "1.0", 1),
            ("_bucket", "+Inf", 2),
            ("_count", "", 2),
            ("_sum", "", 3),
        ]
    }


@pytest.mark.parametrize(
    "text",
    [
        b"tunnel_requests_total 5",
        b"process_cpu_seconds_total 5",
        b"agent_unknown_total 5",
        b"agent_connection_active 1",
        b'agent_connection_active{agent_id="another"} 1',
        b'agent_requests_total{agent_id="another"} 5',
        b'agent_requests_total{le="1"} 5',
        b"agent_requests_total{} 5",
        b"agent_requests_total NaN",
        b"agent_requests_total +Inf",
        b"agent_requests_total inf",
        b"agent_requests_total 1e999",
        b"agent_requests_total -1",
        b"agent_requests_total 1_0",
        b"agent_requests_total 0x10",
        b"agent_requests_total 5 1700000000000",
        b'agent_requests_total 5 # {trace_id="ab"} 1',
        b" agent_requests_total 5",
        b"agent_requests_total  5",
        b"agent_requests_total 5 ",
        b"agent_requests_total 5\r",
        b"agent_requests_total 5\x00",
        b"agent_requests_total\t5",
        b"agent_requests_total " + b"9" * 100,
        "agent_requests_total \u0665".encode(),
        b"agent_requests_total 5\x85agent_requests_success 5",
        b"agent_requests_success_total 5",
        b"agent_requests 5",
        b"agent_heartbeat_rtt_seconds 5",
        b"agent_heartbeat_rtt_seconds_bucket 5",
        b"agent_heartbeat_rtt_seconds_created 5",
        b"# TYPE agent_evil counter",
        b"# EOF",
        b"\xff\xfe",
        b"",
    ],
)
def test_lines_that_are_passed_over(text: bytes) -> None:
    assert parse_report(text) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'le="+Inf"} 2.0', b'le="+Inf"} 0.0'),  # falls
        (b'le="+Inf"} 2.0', b'le="5.0"} 2.0'),  # has no end
        (b"_count 2.0", b"_count 3.0"),
        (b"agent_heartbeat_rtt_seconds_count 2.0\n", b""),
        (b"agent_heartbeat_rtt_seconds_sum 3.0\n", b""),
        (b"_sum 3.0", b"_sum NaN"),
        (b'le="1.0"} 1.0', b'le="1.0"} 1.5'),
        (b'le="1.0"} 1.0', b'le="-1.0"} 1.0'),  # leaves no bucket but +Inf
        (b'le="1.0"} 1.0', b'le="1.0",agent_id="x"} 1.0'),
    ],
)
def test_a_histogram_that_does_not_add_up_is_dropped(old: bytes, new: bytes) -> None:
    assert old in HISTOGRAM
    assert parse_report(HISTOGRAM.replace(old, new)) == {}


def test_bounds_of_a_report() -> None:
    good = b"agent_requests_total 5\n"
    assert parse_report(good) == {"agent_requests_total": [("", "", 5)]}
    assert parse_report(good + b"#" * reports.MAX_BYTES) == {}
    assert parse_report(b"\n" * reports.MAX_LINES + good) == {}
    assert parse_report(good + b"agent_requests_total 6\n") == {"agent_requests_total": [("", "", 5)]}
    many = b"".join(b'agent_heartbeat_rtt_seconds_bucket{le="%d"} 0\n' % n for n in range(reports.MAX_BUCKETS))
    assert parse_report(many + HISTOGRAM) == {}


@pytest.mark.parametrize("name", ['a"} 1\nevil{x="', "a\\", "a\nb", "\x00", "\ud800", "ä😀", "", "x" * 500])
async def test_names_of_agents_and_accounts_cannot_break_out(
    name: str, core: FakeHost, book: AgentBook, clock: Clock
) -> None:
    link(core, book, name, name)
    core.agent_reports = [AgentReport(name, name, await own_report(), clock.now, True)]
    numbers = await read(book)
    assert {key[0] for key in numbers} <= {
        name + suffix for name in FAMILIES for suffix in ("", "_bucket", "_count", "_sum")
    }
    assert len({key[1:3] for key in numbers}) == 1


_word = st.sampled_from(
    [
        *(name.encode() + suffix for name in FAMILIES for suffix in (b"", b"_bucket", b"_count", b"_sum", b"_total")),
        *(b'{le="1.0"}', b'{le="+Inf"}', b'{le="1"}', b'{le="x"}', b'{agent_id="other"}', b"{", b"}", b'"', b"\\"),
        *(b" ", b"  ", b"\n", b"\r\n", b"\t", b"1", b"1.0", b"2", b"1e9", b"NaN", b"+Inf", b"-1", b"# EOF", b"# TYPE "),
    ]
)
_text = st.one_of(st.binary(max_size=300), st.lists(st.one_of(_word, st.binary(max_size=5)), max_size=60).map(b"".join))


@given(text=_text, whole=st.booleans())
def test_whatever_is_said_the_page_stays_sound(text: bytes, whole: bool) -> None:
    """The page parses in both formats, and no series is anybody else's than the agent's own."""
    core = FakeHost()
    clock = Clock()
    book = AgentBook(core, clock)
    core.add_link("c1", "acme", "honest")
    core.add_link("c2", "evil", "liar")
    said = (HISTOGRAM + text) if whole else text
    core.agent_reports = [
        AgentReport("honest", "acme", HISTOGRAM, clock.now, True),
        AgentReport("liar", "evil", said, clock.now, True),
    ]
    numbers = trio.run(read, book)
    honest = {key: number for key, number in numbers.items() if "honest" in key}
    assert len(honest) == 5
    allowed = {name + suffix for name in FAMILIES for suffix in ("", "_bucket", "_count", "_sum")}
    for key in numbers:
        assert key[0] in allowed
        assert key[1:3] in (("acme", "honest"), ("evil", "liar"))


async def test_agents_of_one_name_are_added_up(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    link(core, book)

    async def report(instance: str, requests: int, at: float) -> AgentReport:
        return AgentReport("agent-1", "acme", await own_report(requests), at, True, instance)

    core.agent_reports = [await report("a", 3, clock.now), await report("b", 4, clock.now)]
    assert (await read(book))["agent_requests_total", "acme", "agent-1"] == 7
    # One has gone: what it had counted stays, so that nothing goes backwards.
    core.agent_reports = [await report("b", 5, clock.now + 1)]
    assert (await read(book))["agent_requests_total", "acme", "agent-1"] == 8
    core.agent_reports.append(await report("c", 1, clock.now + 1))
    page = await read(book)
    assert page["agent_requests_total", "acme", "agent-1"] == 9
    assert page["agent_connection_active", "acme", "agent-1"] == 1


async def test_an_agent_that_reports_late_counts_once(core: FakeHost, book: AgentBook, clock: Clock) -> None:
    """Its counters stay while it is late, its gauges do not."""
    link(core, book)
    text = b"agent_streams_total %d\nagent_streams_active 1\n"

    def say(*said: tuple[str, int]) -> None:
        now = [AgentReport("agent-1", "acme", text % streams, clock.now, True, name) for name, streams in said]
        core.agent_reports = [one for one in core.agent_reports if one.instance not in dict(said)] + now

    async def shown() -> tuple[float, float]:
        page = await read(book)
        return page["agent_streams_total", "acme", "agent-1"], page["agent_streams_active", "acme", "agent-1"]

    say(("late", 1000), ("other", 10))
    assert await shown() == (1010, 2)
    for _ in range(3):
        clock.now += reports.STALE_SECONDS + 1
        say(("other", 10))
        assert await shown() == (1010, 1)
        say(("late", 1000))
        assert await shown() == (1010, 2)
    clock.now += 1
    core.agent_reports = []
    say(("other", 11))
    assert await shown() == (1011, 1)  # now it has gone


def test_reports_come_before_they_are_stale() -> None:
    kind = program("agent").by_flag["metrics_report_interval"].option.kind
    with pytest.raises(ValueError, match="at most"):
        kind.check(reports.STALE_SECONDS)


def test_what_several_workers_heard_of_one_agent_is_one() -> None:
    def report(instance: str, text: bytes, at: float, connected: bool) -> AgentReport:
        return AgentReport("agent-1", "acme", text, at, connected, instance)

    found = reports.united(
        [
            [report("a", b"old", 1.0, True), report("b", b"", 9.0, True)],
            [report("a", b"new", 2.0, False), report("b", b"text", 3.0, False)],
        ]
    )
    assert [(one.instance, one.text, one.at, one.connected) for one in found] == [
        ("a", b"new", 2.0, True), ("b", b"text", 3.0, True)
    ]  # fmt: skip
