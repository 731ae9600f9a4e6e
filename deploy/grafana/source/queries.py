"""Which series the dashboards ask for, and what the words in them mean. The outcomes come from the program's table.

Jobs are those of deploy/prometheus/prometheus.yml: `tunnel-core` (the cores), `tunnel-agents` (what agents report over
their links, on a core's /metrics/agents, with agent_id and account_id) and `tunnel-agent` (agents scraped directly).
One agent may be seen through both of the latter, so a query takes one of them, or it would count twice.
"""

from __future__ import annotations

from tunnel.errors import OUTCOMES

CORE = 'job=~"$job",instance=~"$instance"'
ACCOUNT = f'{CORE},account_id=~"$account"'
#: agents on the core's dashboard: as reported over their links to the chosen cores
AGENTS = 'job="$agents_job",instance=~"$instance"'
AGENTS_BY_ACCOUNT = f'{AGENTS},account_id=~"$account"'
#: agents on their own dashboard; an agent that is scraped directly has no account_id, and agent_id on one series only
AGENT = 'job="$job",instance=~"$instance",account_id=~"$account",agent_id=~"$agent"'
RATE = "[$__rate_interval]"

FAILED = "|".join(row.name for row in OUTCOMES.values() if row.failed)
#: what the tunnel itself failed, and what it never had to carry: the words of rules/slo.yml
IN_TUNNEL = "internal|overloaded|draining|link_lost"
VISITORS_FAULTS = (
    "bad_request|method_not_allowed|request_timeout|body_too_large|uri_too_long|head_too_large|no_tunnel|quota"
)
SIDES = {
    side: "|".join(row.name for row in OUTCOMES.values() if row.side == side)
    for side in ("visitor", "agent", "local service", "core")
}
SIDE_COLOURS = {"visitor": "blue", "agent": "orange", "local service": "purple", "core": "red"}
OUTCOME_COLOURS = {"ok": "green", "visitor_aborted": "super-light-blue", "no_tunnel": "light-blue", "quota": "yellow",
                   "no_agent": "light-orange", "link_lost": "dark-orange", "local_refused": "light-purple",
                   "local_broken": "purple", "timeout": "dark-purple", "overloaded": "light-red", "draining": "red",
                   "internal": "dark-red"}  # fmt: skip


def rate(metric: str, labels: str, by: str = "") -> str:
    """`sum by (…) (rate(…))`: sums come after rates, or a restart would look like a burst."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped}(rate({metric}{{{labels}}}{RATE}))"


def quantile(q: float, metric: str, labels: str, by: str = "") -> str:
    """A quantile of a histogram. Without `sum by (le)` each series would get one of its own (the reference page)."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', labels, groups)})"


def mean(metric: str, labels: str, by: str = "") -> str:
    return f"{rate(f'{metric}_sum', labels, by)} / {rate(f'{metric}_count', labels, by)}"
