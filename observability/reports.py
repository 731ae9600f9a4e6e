"""Agents behind NAT can't be scraped: they report over their link, and the core serves what they said, checked.

The agent makes a small text of its own agent_* samples. The core believes none of it: (1) a text beyond MAX_BYTES is
dropped whole; (2) a line counts only if one strict expression matches it: an allow-listed name, `le` as the only
label, a finite number that is not negative; (3) a histogram counts only if it is whole and its buckets add up;
(4) every line of the page is written anew, with `account_id` and `agent_id` from the link, never from the text. So an
agent can lie about its own numbers and do nothing else: no name, label, line or other agent's series comes from it.

Who is connected is the core's own knowledge. An agent that has gone stays listed for 24 hours with
`agent_connection_active 0` and nothing else, or no alert could ever fire. Agents can choose their names, so the list
of those gone is bounded by account and altogether, the oldest forgotten first.

Several agents may share a name (two machines, or one that was started again before the core missed it). They make one
row: counters are added up, those of one that has gone too, so that nothing goes backwards while the name is linked.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator

import trio
from prometheus_client.core import Metric

from observability import agent_metrics
from observability.exposition import EOF_LINE, OPENMETRICS, TEXT, choose, label_value, number, render
from tunnel.handler import AgentReport, Host, LinkVisit, PageAnswer, PageRequest

MAX_BYTES = 64 * 1024  # of one report; a whole one of ours has about 6 KiB
MAX_LINES = 1000  # of one report
MAX_BUCKETS = 40  # of one histogram in a report
GONE_SECONDS = 24 * 3600.0
MAX_GONE_BY_ACCOUNT = 1000
MAX_GONE = 10_000
STALE_SECONDS = 300.0  # of a linked agent's report; past it only agent_connection_active is shown

FAMILIES = {**agent_metrics.FAMILIES, **agent_metrics.WORKER_FAMILIES}  #: what an agent may report

_ACTIVE = "agent_connection_active"
_NUMBER = rb"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?"
_LINE = re.compile(
    rb"(agent_[a-z_]{1,60})(?:\{le=\"(\+Inf|" + _NUMBER + rb")\"\})? (" + _NUMBER + rb")", re.ASCII
)  # use fullmatch
_SCALARS = frozenset(name for name, row in FAMILIES.items() if row.type != "histogram" and name != _ACTIVE)
_HISTOGRAMS = frozenset(name for name, row in FAMILIES.items() if row.type == "histogram")

Key = tuple[str, str]  #: (account_id, agent_id)
Parsed = dict[str, list[tuple[str, str, float]]]  #: family → (suffix, le or "", value)


# The agent's side ------------------------------------------------------------------------------------------------


def make_report(metrics: Iterable[Metric]) -> bytes:
    """The allow-listed families as Prometheus text, at most MAX_BYTES (families that don't fit are left out)."""
    parts: list[bytes] = []
    size = 0
    for metric in metrics:
        if metric.name not in FAMILIES and f"{metric.name}_total" not in FAMILIES:
            continue
        part = render((metric,))
        if size + len(part) <= MAX_BYTES:
            parts.append(part)
            size += len(part)
    return b"".join(parts)


# The core's side -------------------------------------------------------------------------------------------------


def parse_report(text: bytes) -> Parsed:
    """What in a report may be believed; the rest is passed over in silence. Never raises."""
    if len(text) > MAX_BYTES:
        return {}
    scalars: dict[str, float] = {}
    histograms: dict[str, dict[str, float]] = {}  # "_sum", "_count", or a bound
    for line in text.split(b"\n", MAX_LINES)[:MAX_LINES]:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        name = match[1].decode()
        value = float(match[3])
        if not math.isfinite(value):
            continue
        if match[2] is not None:
            base = name.removesuffix("_bucket")
            if base != name and base in _HISTOGRAMS:
                bound = math.inf if match[2] == b"+Inf" else float(match[2])
                histograms.setdefault(base, {}).setdefault(number(bound), value)
        elif name in _SCALARS:
            scalars.setdefault(name, value)
        else:
            base, _, suffix = name.rpartition("_")
            if base in _HISTOGRAMS and suffix in ("sum", "count"):
                histograms.setdefault(base, {}).setdefault(suffix, value)
    parsed: Parsed = {name: [("", "", value)] for name, value in scalars.items()}
    for name, parts in histograms.items():
        samples = _whole_histogram(parts)
        if samples:
            parsed[name] = samples
    return parsed


def _whole_histogram(parts: dict[str, float]) -> list[tuple[str, str, float]]:
    """A histogram's samples in order, or nothing if it does not add up."""
    total, sum_ = parts.pop("count", None), parts.pop("sum", None)
    buckets = sorted((float(bound), bound, value) for bound, value in parts.items())
    if total is None or sum_ is None or not 1 < len(buckets) <= MAX_BUCKETS:
        return []
    counts = [value for _, _, value in buckets]
    if buckets[-1][1] != "+Inf" or counts[-1] != total or counts != sorted(counts):
        return []
    if not all(value.is_integer() for value in counts):
        return []
    samples = [("_bucket", bound, value) for _, bound, value in buckets]
    return [*samples, ("_count", "", total), ("_sum", "", sum_)]


class AgentBook:
    """Which agents there are and were, and what they last said. `clock` gives monotonic seconds."""

    def __init__(
        self,
        host: Host,
        clock: Callable[[], float] = time.monotonic,
        reports: Callable[[], list[AgentReport]] | None = None,
    ) -> None:
        self._host = host
        self._clock = clock
        self._reports = reports or host.reports
        self._linked: set[Key] = set()  # as of the last look
        self._gone: dict[str, dict[str, float]] = {}  # account → agent → when, the oldest first
        self._lines: dict[Key, tuple[object, dict[str, str]]] = {}  # key → (of which reports, family → its lines)
        self._parsed: dict[
            Key, dict[str, tuple[float, Parsed]]
        ] = {}  # key → instance → (the report's time, what it says)
        self._past: dict[Key, Parsed] = {}  # of instances that have gone while others stayed

    def link_began(self, visit: LinkVisit) -> None:
        self._forget(_key(visit.account_id, visit.agent_id))

    def link_ended(self, visit: LinkVisit) -> None:
        self._remember(_key(visit.account_id, visit.agent_id), self._clock())

    def _forget(self, key: Key) -> None:
        agents = self._gone.get(key[0])
        if agents is not None:
            agents.pop(key[1], None)
            if not agents:
                del self._gone[key[0]]

    def _remember(self, key: Key, at: float) -> None:
        self._forget(key)
        agents = self._gone.setdefault(key[0], {})
        agents[key[1]] = at
        if len(agents) > MAX_GONE_BY_ACCOUNT:
            del agents[next(iter(agents))]
        elif sum(map(len, self._gone.values())) > MAX_GONE:
            self._forget(min((since, (account, agent)) for account, agent, since in self._oldest())[1])

    def _oldest(self) -> Iterator[tuple[str, str, float]]:
        for account, agents in self._gone.items():
            agent = next(iter(agents))
            yield account, agent, agents[agent]

    def _look(self) -> dict[Key, list[AgentReport]]:
        """The linked agents now with their newest reports; who was here before and is not now is noted as gone."""
        statistics = self._host.statistics()
        linked: dict[Key, list[AgentReport]] = {
            _key(link.account_id, link.agent_id): [] for link in getattr(statistics, "links", ())
        }
        now = self._clock()
        for report in self._reports():
            key = _key(report.account_id, report.agent_id)
            if report.connected or key in linked:
                reports = linked.setdefault(key, [])
                older = [one for one in reports if one.instance == report.instance]
                if all(one.at < report.at for one in older):
                    reports[:] = [one for one in reports if one not in older] + [report]
            elif key[1] not in self._gone.get(key[0], ()) and report.at > now - GONE_SECONDS:
                self._remember(key, report.at)
        for key in self._linked - linked.keys():
            if key[1] not in self._gone.get(key[0], ()):
                self._remember(key, now)
        for key in linked:
            self._forget(key)
        self._linked = set(linked)
        for known in (self._lines, self._parsed, self._past):
            for key in known.keys() - linked.keys():
                del known[key]
        for account, agents in list(self._gone.items()):
            for agent, since in list(agents.items()):
                if since <= now - GONE_SECONDS:
                    self._forget((account, agent))
        return linked

    async def page(self, request: PageRequest) -> PageAnswer:
        """/metrics/agents. With many agents this is much work: the run loop turns between two of them."""
        is_openmetrics = choose(request.headers.get("accept", ""))
        linked = self._look()
        active = [_sample(_ACTIVE, key, "", 1) for key in linked]
        active += [
            _sample(_ACTIVE, (account, agent), "", 0) for account, agents in self._gone.items() for agent in agents
        ]
        by_agent: list[dict[str, str]] = [{_ACTIVE: "".join(active)}]
        for key, reports in linked.items():
            since = self._clock() - STALE_SECONDS
            if any(one.at >= since and one.text for one in reports):
                by_agent.append(self._lines_of(key, reports, since))
                await trio.lowlevel.checkpoint()
        parts: list[bytes] = []
        for name, family in FAMILIES.items():
            lines = [agent[name] for agent in by_agent if agent.get(name)]
            if lines:
                parts.append("".join((family.header(is_openmetrics), *lines)).encode())
                await trio.lowlevel.checkpoint()
        if is_openmetrics:
            parts.append(EOF_LINE)
        return PageAnswer(200, b"".join(parts), OPENMETRICS if is_openmetrics else TEXT)

    def _lines_of(self, key: Key, reports: list[AgentReport], since: float) -> dict[str, str]:
        which = tuple((one.instance, one.at, one.at >= since) for one in reports)
        known, lines = self._lines.get(key, (None, {}))
        if known != which:
            lines = {
                name: "".join(_sample(name + suffix, key, le, value) for suffix, le, value in samples)
                for name, samples in self._sum(key, reports, since).items()
            }
            self._lines[key] = which, lines
        return lines

    def _sum(self, key: Key, reports: list[AgentReport], since: float) -> Parsed:
        """Of an instance that is late (its report is from before `since`) the counters count on: it has not gone."""
        parsed = self._parsed.setdefault(key, {})
        for gone in parsed.keys() - {one.instance for one in reports}:
            self._past[key] = add_parsed(self._past.get(key, {}), _lasting(parsed.pop(gone)[1]))
        total = self._past.get(key, {})
        for report in reports:
            known = parsed.get(report.instance)
            if known is None or known[0] != report.at:
                known = parsed[report.instance] = report.at, parse_report(report.text)
            total = add_parsed(total, known[1] if report.at >= since else _lasting(known[1]))
        return total


def _lasting(parsed: Parsed) -> Parsed:
    """All but gauges, which are of their moment."""
    return {name: samples for name, samples in parsed.items() if FAMILIES[name].type != "gauge"}


def add_parsed(one: Parsed, other: Parsed) -> Parsed:
    """Two reports as one. A histogram whose buckets are not the other's is passed over."""
    total = dict(one)
    for name, samples in other.items():
        known = total.get(name)
        if known is None:
            total[name] = samples
        elif [sample[:2] for sample in known] == [sample[:2] for sample in samples]:
            add = max if FAMILIES[name].merge == "max" else float.__add__
            total[name] = [(suffix, le, add(a, b)) for (suffix, le, a), (_, _, b) in zip(known, samples, strict=True)]
    return total


def united(said: Iterable[list[AgentReport]]) -> list[AgentReport]:
    """What several workers have heard of the same agents: of each the newest report, and whether any has a link."""
    found: dict[tuple[str, str, str], AgentReport] = {}
    for report in (report for reports in said for report in reports):
        key = report.account_id, report.agent_id, report.instance
        known = found.get(key)
        if known is None:
            found[key] = report
            continue
        newest = max((one for one in (known, report) if one.text), key=lambda one: one.at, default=known)
        newest.connected = known.connected or report.connected
        found[key] = newest
    return list(found.values())


def _key(account_id: str, agent_id: str) -> Key:
    return label_value(account_id), label_value(agent_id)


def _sample(name: str, key: Key, le: str, value: float) -> str:
    account, agent = (text.replace("\\", r"\\").replace('"', r"\"") for text in key)
    bound = f',le="{le}"' if le else ""
    return f'{name}{{account_id="{account}",agent_id="{agent}"{bound}}} {number(value)}\n'
