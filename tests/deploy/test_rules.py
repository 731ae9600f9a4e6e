"""The shipped Prometheus rules, by promtool: they parse, and each alert fires when it should and only then.

`CASES` has for each alert the series under which it fires, those under which it stays silent, and the minute that is
looked at. Series are written as promtool writes them, one sample a minute: `0+6x60` is 0, 6, 12, … for 61 minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tunnel.errors import OUTCOMES

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))

CORE = 'job="tunnel-core",instance="core:9090"'
AGENTS = 'job="tunnel-agents",instance="core:9090",account_id="acme",agent_id="a"'
DIRECT = 'job="tunnel-agent",instance="a:9091"'
SELF = 'job="prometheus",instance="localhost:9093"'

Series = dict[str, str]


class Case(NamedTuple):
    fires: Series
    silent: Series
    minute: int = 30


def links(now: str) -> Series:
    return {f"tunnel_connections_active{{{CORE}}}": now, f"tunnel_connections_limit{{{CORE}}}": "1000x60"}


def answers(bad: str, minutes: int = 60) -> Series:
    """A request a second, and this many of code 502 a minute."""
    good = f'tunnel_requests_total{{{CORE},code="200"}}'
    return {good: f"0+60x{minutes}", f'tunnel_requests_total{{{CORE},code="502"}}': f"0+{bad}x{minutes}"}


def outcomes(word: str, bad: int, minutes: int) -> Series:
    name = "tunnel_request_outcomes_total"
    return {f'{name}{{{CORE},outcome="ok"}}': f"0+60x{minutes}",
            f'{name}{{{CORE},outcome="{word}"}}': f"0+{bad}x{minutes}"}  # fmt: skip


def durations(below: int, minutes: int = 60, name: str = "tunnel_request_duration_seconds") -> Series:
    """60 observations a minute, `below` of them under a second, the others under 5 s."""
    return {f'{name}_bucket{{{CORE},le="1.0"}}': f"0+{below}x{minutes}",
            f'{name}_bucket{{{CORE},le="5.0"}}': f"0+60x{minutes}",
            f'{name}_bucket{{{CORE},le="+Inf"}}': f"0+60x{minutes}",
            f"{name}_count{{{CORE}}}": f"0+60x{minutes}"}  # fmt: skip


def local(errors: int) -> Series:
    return {f"agent_local_requests_total{{{AGENTS}}}": "0+60x60",
            f"agent_local_requests_error{{{AGENTS}}}": f"0+{errors}x60"}  # fmt: skip


def restored(attempts: int, failed: int) -> Series:
    return {f"agent_connection_active{{{AGENTS}}}": "1x60",
            f"agent_reconnections_total{{{AGENTS}}}": f"0+{attempts}x60",
            f"agent_reconnection_errors_total{{{AGENTS}}}": f"0+{failed}x60"}  # fmt: skip


def tcp(failed: int, requests_failed: int = 0) -> Series:
    """12 TCP connections and 12 requests a minute, of which so many fail."""
    counts = {"streams_completed": 24 - failed - requests_failed, "streams_failed": failed + requests_failed,
              "requests_success": 12 - requests_failed, "requests_failed": requests_failed}  # fmt: skip
    return {f"agent_{name}{{{AGENTS}}}": f"0+{count}x60" for name, count in counts.items()}


def with_links(values: str, core_workers: int = 1, agent_workers: int = 1) -> Series:
    """An agent whose links came back so often."""
    series = {f"agent_connection_active{{{AGENTS}}}": "1x60", f"agent_reconnections_total{{{AGENTS}}}": values,
              f"agent_reconnection_errors_total{{{AGENTS}}}": "0x60"}  # fmt: skip
    if core_workers > 1:
        series[f"tunnel_workers{{{CORE}}}"] = f"{core_workers}x60"
    if agent_workers > 1:
        series[f"agent_workers{{{AGENTS}}}"] = f"{agent_workers}x60"
    return series


def refused(reason: str, a_minute: int) -> Series:
    return {f'tunnel_authentication_failures_total{{{CORE},reason="{reason}"}}': f"0+{a_minute}x60"}


def at_limit(limit: str, a_minute: int) -> Series:
    return {f'tunnel_limit_refusals_total{{{CORE},limit="{limit}"}}': f"0+{a_minute}x60"}


def held(mebibytes: int) -> Series:
    return {f"tunnel_held_bytes{{{CORE}}}": f"{mebibytes * 2**20}x60",
            f"tunnel_held_bytes_limit{{{CORE}}}": f"{512 * 2**20}x60"}  # fmt: skip


def ready(check: str, values: str) -> Series:
    return {f'tunnel_readiness_check{{{CORE},check="{check}"}}': values}


def queries(fast: int) -> Series:
    name, more = "tunnel_db_query_duration_seconds_bucket", 'operation="token.find"'
    return {f'{name}{{{CORE},{more},le="0.1"}}': f"0+{fast}x60", f'{name}{{{CORE},{more},le="1.0"}}': "0+60x60",
            f'{name}{{{CORE},{more},le="+Inf"}}': "0+60x60",
            f'{name.replace("_bucket", "_count")}{{{CORE},{more}}}': "0+60x60"}  # fmt: skip


def first_bytes(below: int, minutes: int) -> Series:
    return durations(below, minutes, "tunnel_time_to_first_byte_seconds")


def certificate(days_left: float, minute: int = 120) -> Series:
    """A test's clock starts at 0, so this is the minute that is looked at, and the days from there."""
    seconds = minute * 60 + days_left * 86400
    return {f'tunnel_certificate_expiry_timestamp_seconds{{{CORE},listener="public"}}': f"{seconds:.0f}x180",
            f'tunnel_certificate_expiry_timestamp_seconds{{{CORE},listener="agent"}}': "600000000x180"}  # fmt: skip


UP = 'up{job="%s",instance="x:1"}'
FIRST_BYTE_DAY = 26 * 60

CASES: dict[str, Case] = {
    "HighConnectionCount": Case(links("901x60"), links("899x60")),
    "ConnectionLimitReached": Case(links("1000x60"), links("999x60")),
    "HighErrorRate": Case(answers("6"), answers("3")),  # 9 % and 4.8 %
    "HighLatency": Case(durations(50), durations(60)),
    "HighMemoryUsage": Case(
        {f"process_resident_memory_bytes{{{CORE}}}": "820000000x60"},
        {f"process_resident_memory_bytes{{{CORE}}}": "780000000x60",
         f"process_resident_memory_bytes{{{DIRECT}}}": "400000000x60"},
    ),
    "TunnelCoreDown": Case({UP % "tunnel-core": "1x10 0x30"}, {UP % "tunnel-core": "1x28 0 1x10"}),
    "TunnelCoreAbsent": Case({UP % "other": "1x60"}, {UP % "tunnel-core": "1x60"}),
    "AgentsLost": Case(links("10x25 4x20"), links("10x25 6x20")),
    "QuotaExceeded": Case(
        {f'tunnel_quota_exceeded_total{{{CORE},type="requests"}}': "0+1x60"},
        {f'tunnel_quota_exceeded_total{{{CORE},type="requests"}}': "7x60"},
    ),
    "QuotaNearlyUsed": Case(
        {f'tunnel_quota_{what}{{{CORE},account_id="a",type="requests"}}': f"{value}x60"
         for what, value in (("usage", 95), ("limit", 100))},
        {f'tunnel_quota_{what}{{{CORE},account_id="a",type="{kind}"}}': f"{value}x60"
         for what, value in (("usage", 95), ("limit", 100)) for kind in ("connection", "names", "ports")}
        | {f'tunnel_quota_usage{{{CORE},account_id="b",type="requests"}}': "95x60",
           f'tunnel_quota_limit{{{CORE},account_id="b",type="requests"}}': "1000000x60"},
    ),
    "AuthenticationFailures": Case(refused("bad_token", 12), refused("draining", 12)),
    "StoreUnavailable": Case(
        refused("unavailable", 1), refused("bad_token", 1) | ready("store", "1x60") | ready("draining", "0x60")
    ),
    "StoreSlow": Case(queries(30), queries(60)),
    "CapacityLimitReached": Case(at_limit("link_streams", 4), at_limit("connection_requests", 40)),
    "HeldBytesHigh": Case(held(450), held(350)),
    "VisitorsHitLimits": Case(at_limit("head_time", 90), at_limit("idle_time", 900)),
    "AgentPortUnderLoad": Case(at_limit("failed_logins", 20), at_limit("handshakes", 6)),
    "LinkProtocolErrors": Case(
        {f"tunnel_protocol_errors_total{{{CORE}}}": "0+1x60"},
        {f"tunnel_protocol_errors_total{{{CORE}}}": "0x20 2x40"},
    ),
    "RunLoopLag": Case(
        {f"trio_run_loop_lag_seconds{{{CORE}}}": "0.4x60"},
        {f"trio_run_loop_lag_seconds{{{CORE}}}": "0.01x29 3 0.01x20"},
    ),
    "FileDescriptorsNearlyUsed": Case(
        {f"process_open_fds{{{CORE}}}": "900x60", f"process_max_fds{{{CORE}}}": "1024x60"},
        {f"process_open_fds{{{CORE}}}": "700x60", f"process_max_fds{{{CORE}}}": "1024x60"},
    ),
    "CoreRestarts": Case(
        {f"process_start_time_seconds{{{CORE}}}": "100x5 200x5 300x5 400x20"},
        {f"process_start_time_seconds{{{CORE}}}": "100x5 200x5 300x30"},
    ),
    "WorkersMissing": Case(
        {f"tunnel_workers{{{CORE}}}": "4x60", f"tunnel_workers_active{{{CORE}}}": "4x20 3x40"},
        {f"tunnel_workers{{{CORE}}}": "4x60", f"tunnel_workers_active{{{CORE}}}": "4x28 3 4x40"},
    ),
    "WorkerRestarts": Case(
        {f"agent_worker_restarts_total{{{AGENTS}}}": "0x10 1x5 2x5 3x5 4x40"},
        {f"tunnel_worker_restarts_total{{{CORE}}}": "0x10 1x5 2x40"},
    ),
    "LogsDropped": Case(
        {f"agent_logs_dropped_total{{{AGENTS}}}": "0+5x60"}, {f"agent_logs_dropped_total{{{AGENTS}}}": "500x60"}
    ),
    "SpansDropped": Case(
        {f"agent_spans_dropped_total{{{AGENTS}}}": "0+5x60"}, {f"tunnel_spans_dropped_total{{{CORE}}}": "0x26 500x30"}
    ),
    "CertificateOrdersFail": Case(
        {f"tunnel_acme_names_failing{{{CORE}}}": "2x500"},
        {f"tunnel_acme_names_failing{{{CORE}}}": "0x100 1x300 0x100"},
        480,
    ),
    "CertificateExpiresSoon": Case(certificate(13), certificate(15), 120),
    "CertificateAboutToExpire": Case(certificate(-1), certificate(4), 120),
    "AgentDisconnected": Case(
        {f"agent_connection_active{{{AGENTS}}}": "1x10 0x30"}, {f"agent_connection_active{{{AGENTS}}}": "1x28 0 1x10"}
    ),
    "HighReconnectionRate": Case(restored(2, 1), restored(60, 60)),  # an outage is no flapping
    "LocalServiceErrors": Case(local(9), local(5)),
    "AgentReportMissing": Case(
        {f"agent_connection_active{{{AGENTS}}}": "1x60"},
        {f"agent_connection_active{{{AGENTS}}}": "1x60", f"agent_requests_total{{{AGENTS}}}": "0x60"},
    ),
    "TunnelAvailabilityBurnFast": Case(outcomes("link_lost", 2, 120), outcomes("local_refused", 20, 120), 110),
    "TunnelAvailabilityBurnSlow": Case(
        outcomes("overloaded", 1, FIRST_BYTE_DAY), outcomes("no_tunnel", 20, FIRST_BYTE_DAY), FIRST_BYTE_DAY - 5
    ),
    "TunnelLatencyBurnFast": Case(first_bytes(45, 120), first_bytes(58, 120), 110),
    "TunnelLatencyBurnSlow": Case(
        first_bytes(57, FIRST_BYTE_DAY), first_bytes(60, FIRST_BYTE_DAY), FIRST_BYTE_DAY - 5
    ),
    "ScrapeFailing": Case(
        {UP % "tunnel-agent": "1x10 0x30"},
        {UP % "tunnel-core": "1x10 0x30", UP % "node": "0x60", UP % "tunnel-agents": "1x60"},
    ),
    "AgentMetricsAbsent": Case({UP % "tunnel-core": "1x60"}, {UP % "tunnel-agents": "1x60"}),
    "ScrapeSlow": Case({f"scrape_duration_seconds{{{CORE}}}": "6x60"}, {f"scrape_duration_seconds{{{CORE}}}": "1x60"}),
    "TooManySamples": Case(
        {'scrape_samples_post_metric_relabeling{job="tunnel-agents",instance="core:9090"}': "2000x60",
         f"agent_connection_active{{{AGENTS}}}": "1x60"},
        {'scrape_samples_post_metric_relabeling{job="tunnel-agents",instance="core:9090"}': "900x60",
         f"agent_connection_active{{{AGENTS}}}": "1x60"},
    ),
    "SeriesChurn": Case(
        {f"scrape_series_added{{{CORE}}}": "500x120", f"scrape_samples_post_metric_relabeling{{{CORE}}}": "600x120"},
        {f"scrape_series_added{{{CORE}}}": "5x120", f"scrape_samples_post_metric_relabeling{{{CORE}}}": "600x120"},
        100,
    ),
    "SeriesGrowth": Case(
        {f"prometheus_tsdb_head_series{{{SELF}}}": "30000x1400 90000x300"},
        {f"prometheus_tsdb_head_series{{{SELF}}}": "60000x1400 90000x300"},
        1550,
    ),
    "RuleFailures": Case(
        {f'prometheus_rule_evaluation_failures_total{{{SELF},rule_group="r.yml;tunnel-x"}}': "0+1x60"},
        {f'prometheus_rule_evaluation_failures_total{{{SELF},rule_group="r.yml;others"}}': "0+1x60"},
    ),
    "ConfigReloadFailed": Case(
        {f"prometheus_config_last_reload_successful{{{SELF}}}": "0x60"},
        {f"prometheus_config_last_reload_successful{{{SELF}}}": "1x28 0 1x31"},
    ),
    "AlertsNotDelivered": Case(
        {f"prometheus_notifications_alertmanagers_discovered{{{SELF}}}": "0x60"},
        {f"prometheus_notifications_alertmanagers_discovered{{{SELF}}}": "1x60",
         f"prometheus_notifications_errors_total{{{SELF}}}": "2x60"},
    ),
}  # fmt: skip


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is missing: install the package prometheus (scripts/packages)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def run_tests(tmp_path: Path, tests: list[dict[str, Any]], alert: str = "", every: str = "1m") -> None:
    """With the recording rules and the file that has this alert."""
    files = [str(path) for path in RULES if path.name == "recording.yml" or f"alert: {alert}\n" in path.read_text()]
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": files, "evaluation_interval": every, "tests": tests}))  # JSON is YAML
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def expectation(series: Series, minute: int, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """samples: what each expression is to give."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{minute}m", "exp_samples": expected} for expr, expected in samples.items()
        ],
    }


def test_the_configuration_and_the_rules_are_valid() -> None:
    done = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "rules", *map(str, RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_cases() -> None:
    assert set(CASES) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_is_wrong_and_how_bad(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) >= {"summary", "description"}
    assert not rule["annotations"]["summary"].endswith(".")
    if "increase(" in rule["expr"]:  # which makes 3.05 of three
        assert not re.search(r"\$value (\| humanize )?}}", rule["annotations"]["description"])


@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_when_it_should_and_only_then(name: str, tmp_path: Path) -> None:
    case, firing = CASES[name], f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'
    run_tests(
        tmp_path,
        [
            expectation(case.fires, case.minute, {firing: [{"labels": "{}", "value": 1}]}),
            expectation(case.silent, case.minute, {firing: []}),
        ],
        name,
        "5m" if case.minute > 600 else "1m",
    )


@pytest.mark.parametrize("name", CASES)
def test_a_firing_alert_says_it_in_words(name: str, tmp_path: Path) -> None:
    """As Prometheus fills it in: no label that is not there, no number to think about (200m)."""
    case = CASES[name]
    test = expectation(case.fires, case.minute, {})
    test["alert_rule_test"] = [{"eval_time": f"{case.minute}m", "alertname": name, "exp_alerts": []}]  # it says what is
    files = [str(path) for path in RULES if path.name == "recording.yml" or f"alert: {name}\n" in path.read_text()]
    every = "5m" if case.minute > 600 else "1m"
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": files, "evaluation_interval": every, "tests": [test]}))
    done = promtool("test", "rules", str(file))
    said = re.search(r'description="((?:[^"\\]|\\.)*)"', done.stdout + done.stderr)
    assert said is not None, done.stdout + done.stderr
    assert not re.search(r"error expanding|<no value>|^ |  | [.,:]|(?<![dh] )\b\d+(\.\d+)?[mun] ", said[1]), said[1]


#: a night with little traffic, in which the ratio alone would have rung
QUIET: dict[str, Series] = {
    "HighErrorRate": {f'tunnel_requests_total{{{CORE},code="200"}}': "0+1x60",
                      f'tunnel_requests_total{{{CORE},code="502"}}': "0x20 1x2 2x40"},
    "HighLatency": {name: values.replace("50", "1").replace("60x", "2x") for name, values in durations(50).items()},
    "LocalServiceErrors": {f"agent_local_requests_total{{{AGENTS}}}": "0+1x60",
                           f"agent_local_requests_error{{{AGENTS}}}": "0x20 1x4 2x40"},
    "StoreSlow": {name: values.replace("30x", "0x").replace("+60x", "+0.5x") for name, values in queries(30).items()},
    "StoreUnavailable": {f'tunnel_authentication_failures_total{{{CORE},reason="unavailable"}}': "0x28 40x30"}
    | ready("store", "1x27 0x1 1x30"),
    "TunnelAvailabilityBurnFast": {
        f'tunnel_request_outcomes_total{{{CORE},outcome="ok"}}': "0+1x60",
        f'tunnel_request_outcomes_total{{{CORE},outcome="link_lost"}}': "0x20 1x5 2x5 3x40"},
    "QuotaExceeded": {f'tunnel_quota_exceeded_total{{{CORE},type="requests"}}': "0x26 90x40"},
    "CapacityLimitReached": {
        f'tunnel_limit_refusals_total{{{CORE},limit="connections"}}': "0x26 500x40"},
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_little_traffic_and_a_single_blip_ring_nobody(name: str, tmp_path: Path) -> None:
    firing = f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'
    run_tests(tmp_path, [expectation(QUIET[name], minute, {firing: []}) for minute in (26, 28, 30, 31, 32)], name)


def test_a_store_that_is_away_rings_also_while_no_agent_asks(tmp_path: Path) -> None:
    """All are connected: nobody is refused. Once, also when both signs are there."""
    firing = 'count(ALERTS{alertname="StoreUnavailable",alertstate="firing"})'
    away, here = ready("store", "1x10 0x40"), ready("store", "1x60")
    other = {name.replace("core:9090", "other:9090"): values for name, values in here.items()}
    tests = [
        expectation(away | other, 30, {firing: [{"labels": "{}", "value": 1}]}),
        expectation(away | refused("unavailable", 1), 30, {firing: [{"labels": "{}", "value": 1}]}),
        expectation(here | other, 30, {firing: []}),
    ]
    run_tests(tmp_path, tests, "StoreUnavailable")


@pytest.mark.parametrize(
    ("series", "fires"),
    [
        pytest.param(with_links("0x12 8x45", 4, 2), False, id="an upgrade of a core with 4 workers, agent with 2"),
        pytest.param(with_links("0x12 12x45", 4), False, id="three upgrades"),
        pytest.param(with_links("0x12 16x45", 4), True, id="four times each of 4 links"),
        pytest.param(with_links("0+8x60", 4, 2), True, id="all 8 links a minute"),
        pytest.param(with_links("0x12 3x45"), False, id="three times one link"),
        pytest.param(with_links("0x12 4x45"), True, id="four times one link"),
        pytest.param({name.replace(AGENTS, DIRECT): values for name, values in with_links("0x12 8x45", 4, 2).items()}
                     | {f'agent_connection_active{{{DIRECT},agent_id="a"}}': "1x60"}, False, id="scraped directly"),
        pytest.param({name.replace(AGENTS, DIRECT): values for name, values in with_links("0+8x60", 4, 2).items()}
                     | {f'agent_connection_active{{{DIRECT},agent_id="a"}}': "1x60"}, True, id="the same, flapping"),
    ],
)  # fmt: skip
def test_an_upgrade_is_no_flapping(series: Series, fires: bool, tmp_path: Path) -> None:
    """An agent has a link from each of its processes to each worker of the core, and one event renews them all."""
    series = {name: values for name, values in series.items() if name != f"agent_connection_active{{{DIRECT}}}"}
    firing = 'count(ALERTS{alertname="HighReconnectionRate",alertstate="firing"}) or vector(0)'
    expected = [{"labels": "{}", "value": int(fires)}]
    run_tests(tmp_path, [expectation(series, 20, {firing: expected})], "HighReconnectionRate")


def test_a_dead_tcp_service_rings_once_and_a_dead_http_service_too(tmp_path: Path) -> None:
    """Its connections are no requests. Requests that fail are streams that fail: they count as requests only."""
    firing = 'count(ALERTS{alertname="LocalServiceErrors",alertstate="firing"}) or vector(0)'
    direct = {name.replace(AGENTS, DIRECT): values for name, values in tcp(12).items()}
    direct[f'agent_connection_active{{{DIRECT},agent_id="a"}}'] = "1x60"
    cases = [
        (tcp(12), 1), (direct, 1), (tcp(1), 0), (tcp(0, 12), 0),
        (tcp(12) | local(30), 1), (tcp(0, 12) | local(30), 1), (tcp(12, 12) | local(0), 1),
        (tcp(0) | {f"agent_streams_failed{{{AGENTS}}}": "0x24 40x40"}, 0),  # a link that broke with its connections
    ]  # fmt: skip
    tests = [
        expectation(series, minute, {firing: [{"labels": "{}", "value": value}]})
        for series, value in cases
        for minute in (26, 28, 30)
    ]
    run_tests(tmp_path, tests, "LocalServiceErrors")


def test_what_counts_agents_says_agents() -> None:
    """An agent has a link to each worker of a core, and the limit counts it once."""
    counting = [rule for rule in ALERTS.values() if re.search(r"tunnel_connections_(active|limit)", rule["expr"])]
    assert len(counting) >= 3
    for rule in counting:
        said = rule["annotations"]["summary"] + " " + rule["annotations"]["description"]
        assert "agents" in said and not re.search(r"agent links?|link limit", said, re.IGNORECASE), said


def test_rules_keep_to_the_craft() -> None:
    """What makes rules lie or flap: windows of few scrapes, quantiles of single series, sums before rates."""
    for rule in rules():
        expr, name = rule["expr"], rule.get("alert") or rule["record"]
        for window in re.findall(r"\[(\w+)(?::\w+)?\]", expr):
            assert window.endswith(("m", "h", "d")) and (window[-1] != "m" or int(window[:-1]) >= 2), (name, window)
        for by in re.findall(r"histogram_quantile\([\d.]+,\s*sum by \(([^)]*)\)", expr):
            assert "le" in by.replace(" ", "").split(","), name
        assert expr.count("histogram_quantile(") == len(re.findall(r"histogram_quantile\([\d.]+,\s*sum by", expr)), name
        assert not re.search(r"(rate|increase)\(\s*(sum|max|min|avg)", expr), name
        bare = re.sub(r"(rate|increase|changes)\(\s*\w+(\{[^}]*\})?\[\w+\]\s*\)", "", expr)
        bare = re.sub(r"agent_requests_total\{[^}]*\} or", "", bare)  # asked whether it is there
        assert not re.search(r"_total\b|_count\b|_bucket\b", bare), name
        if "alert" in rule:
            assert "for" in rule or name in ("CoreRestarts", "WorkerRestarts"), name


def test_meta_alerts_watch_every_job_of_ours_and_no_other() -> None:
    """But for the core, whose alert is another; the jobs are those of both sets of targets."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {one["job_name"] for one in config["scrape_configs"]}
    for path in [*PROMETHEUS.glob("targets/*.yml"), *(PROMETHEUS.parent / "compose" / "targets").glob("*.yml")]:
        groups = yaml.safe_load(path.read_text()) or []
        jobs |= {group["labels"]["job"] for group in groups if "job" in group["labels"]}
    assert len(jobs) == 9
    for name, apart in (("ScrapeFailing", {"tunnel-core"}), ("ScrapeSlow", set[str]())):
        [wanted] = re.findall(r'job=~"([^"]+)"', ALERTS[name]["expr"])
        assert {job for job in jobs | {"node", "kubelet"} if re.fullmatch(wanted, job)} == jobs - apart


def test_memory_alerts_before_the_kernel_kills() -> None:
    """The lines are three quarters of what compose and Kubernetes let the programs have."""
    lines = {job: int(size) for job, size in re.findall(
        r'job="(tunnel-\w+)"\} > (\d+) \* 1024 \* 1024', ALERTS["HighMemoryUsage"]["expr"])}  # fmt: skip
    deploy = PROMETHEUS.parent
    compose = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    for job, directory, file in (("tunnel-core", "core", "statefulset"), ("tunnel-agent", "agent", "deployment")):
        manifest = yaml.safe_load((deploy / "kubernetes" / directory / f"{file}.yaml").read_text())
        pod = manifest["spec"]["template"]["spec"]
        limits = (compose[directory]["deploy"]["resources"]["limits"]["memory"],
                  pod["containers"][0]["resources"]["limits"]["memory"])  # fmt: skip
        for limit in limits:
            assert lines[job] / 0.75 == int(re.sub(r"\D", "", limit)) * (1024 if "G" in limit else 1), (job, limit)


def test_each_agent_counts_once(tmp_path: Path) -> None:
    """Seen through two cores and scraped directly as well; one that only a direct scrape knows counts too."""
    series: Series = {}
    for core in ("core-1:9090", "core-2:9090"):
        labels = f'job="tunnel-agents",instance="{core}",account_id="acme",agent_id="a"'
        series |= {f"agent_connection_active{{{labels}}}": "1x30", f"agent_requests_total{{{labels}}}": "0+60x30"}
    for agent in ("a", "b"):
        labels = f'job="tunnel-agent",instance="{agent}:9091"'
        series[f'agent_connection_active{{{labels},agent_id="{agent}"}}'] = "1x30"
        series[f"agent_requests_total{{{labels}}}"] = "0+60x30"
    known, alone = '{account_id="acme",agent_id="a"}', '{agent_id="b"}'
    both = [{"labels": known, "value": 1}, {"labels": alone, "value": 1}]
    run_tests(
        tmp_path,
        [
            expectation(
                series, 20, {f"{name} * 1": both for name in ("agent:connection_active", "agent:requests:rate5m")}
            )
        ],
    )


def test_the_objectives_name_outcomes_of_the_table() -> None:
    """Ours are failures that the operator of a core can mend; a visitor's own are left out of the count."""
    used = re.findall(r'outcome(=~|!~)"([a-z_|]+)"', (PROMETHEUS / "rules" / "slo.yml").read_text())
    ours = {words for how, words in used if how == "=~"}
    visitors = {words for how, words in used if how == "!~"}
    assert ours == {"internal|overloaded|draining|link_lost"} and len(visitors) == 1
    assert set("|".join(ours | visitors).split("|")) <= set(OUTCOMES)
    [words] = visitors
    harmless = {name for name, row in OUTCOMES.items() if row.side == "visitor" and row.status not in (0, 499)}
    assert set(words.split("|")) == harmless - {"ok", "visitor_aborted"}
