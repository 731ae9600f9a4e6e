"""The status as a page: is the core ready, what is served by whom, and why requests failed.

One document without scripts and without anything from elsewhere; its own style is all that the policy lets in. Each
failed request has its id as anchor, so `/#ID` with the id on a visitor's error page leads to the reason. What visitors,
agents and services have chosen is escaped here and was cut before (tunnel/core/recent.py); of long lists the first rows
are shown, the JSON has them all.
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tunnel.errors import OUTCOMES, row_of
from tunnel.log import CONTROL

if TYPE_CHECKING:
    from tunnel.core.recent import FailedRequest
    from tunnel.core.status import Status, TunnelStatus
    from tunnel.handler import LinkStatistics

MAX_ROWS = 200  #: tunnels, and links
MAX_LINKS = 8  #: of one tunnel
MAX_TEXT = 300  #: characters of a name or reason
_ANCHORS = frozenset({"failures", "tunnels", "agents"})

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#566072;--paper:#fbfbf9;--line:#c9ced6;--mark:#eef1f5;--ok:#17703f;
--bad:#b3261e;--odd:#8a5a00}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#a3abb9;--paper:#15181d;--line:#3c434f;--mark:#22272f;
--ok:#6cc795;--bad:#ff8a80;--odd:#e8b45a}}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.5 system-ui,sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.5rem 1.25rem 3rem}
h1{font-size:1.5rem;line-height:1.3;margin:0}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
a{color:inherit}
p,ul{margin:.35rem 0}
ul{padding:0;list-style:none}
.soft,dt,th,small{color:var(--soft);font-size:.875rem;font-weight:400}
.ok{color:var(--ok)}.bad{color:var(--bad)}.odd{color:var(--odd)}
code{font:.9em ui-monospace,monospace}
code,td,b,p{overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:1rem 0}
dd{margin:0;font-size:1.15rem}
table{border-collapse:collapse;width:100%}
td:first-child{min-width:14rem}td:last-child{min-width:7rem}
th,td{text-align:left;vertical-align:top;padding:.35rem 1rem .35rem 0;border-top:1px solid var(--line)}
.failures li{border:1px solid var(--line);border-left:.3rem solid var(--odd);border-radius:.4rem;padding:.5rem .75rem;
margin:.6rem 0}
.failures .failed{border-left-color:var(--bad)}
li:target{background:var(--mark);outline:.15rem solid var(--ink)}
@media(max-width:44rem){thead{display:none}tr,td{display:block;border:0;padding:0}
tr{border-top:1px solid var(--line);padding:.5rem 0}td[data-is]::before{content:attr(data-is) ": ";color:var(--soft)}}
""".strip()
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def render(status: Status) -> str:
    """The whole document."""
    now = time.time()
    is_ready = all(check["ok"] for check in status.checks.values())
    links = {link.connection_id: link for link in status.links}
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="robots" content="noindex">\n'
        f"<title>{'Ready' if is_ready else 'Not ready'} · tunnel core</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join(
        [
            *_summary(status, is_ready, now),
            *_tunnels(status.tunnels, links),
            *_agents(status.links, now),
            *_failures(status.failures, now),
            '<p class="soft">Programs get the same as JSON: <code>curl</code> this address, or send '
            "<code>Accept: application/json</code>.</p>\n</main>\n</body>\n</html>\n",
        ]
    )


def _summary(status: Status, is_ready: bool, now: float) -> Iterable[str]:
    word = '<span class="ok">✓ ready</span>' if is_ready else '<span class="bad">✗ not ready</span>'
    yield f"<h1>tunnel core: {word}</h1>"
    yield (
        f'<p class="soft">Version {_text(status.version)}, up for {lasting(status.uptime_seconds)}. '
        f'As of {_time(now)}; <a href="">load it again</a> for what is new. '
        '<a href="#tunnels">Tunnels</a> · <a href="#agents">Agents</a> · <a href="#failures">Failed requests</a></p>'
    )
    yield "<ul>"
    for name, check in status.checks.items():
        mark = '<span class="ok">✓' if check["ok"] else '<span class="bad">✗'
        yield f"<li>{mark} {_text(name)}</span>: {_text(check['reason'])}</li>"
    yield "</ul>\n<dl>"
    requests = status.requests
    limit = status.connections["limit"]
    of = f" of {limit:g}" if limit and limit < math.inf else ""
    yield _fact("Requests", f"{requests['total']}")
    yield _fact("Failed", f"{requests['failed']}", "bad" if requests["failed"] else "")
    yield _fact("Agents", f"{status.connections['active']:g}{of}")
    yield _fact("Tunnels", f"{len(status.tunnels)}")
    yield "</dl>"
    outcomes = requests["outcomes"]
    if outcomes:
        own = requests["failed"] - sum(count for name, count in outcomes.items() if OUTCOMES[name].failed)
        more = f" ({own} of the ok ones are a local service's own 5xx)" if own else ""
        yield f'<p><span class="soft">How they ended:</span> {_counts(outcomes)}{more}</p>'
    if status.limit_refusals:
        yield f'<p><span class="soft">Limits that were reached:</span> {_counts(status.limit_refusals)}</p>'


def _tunnels(tunnels: Sequence[TunnelStatus], links: dict[str, LinkStatistics]) -> Iterable[str]:
    yield '<h2 id="tunnels">Tunnels</h2>'
    if not tunnels:
        yield "<p>Nothing is served: no agent is connected, and no name is held for one.</p>"
        return
    yield "<table><thead><tr><th>Tunnel<th>Served by<th>Account</thead><tbody>"
    for tunnel in tunnels[:MAX_ROWS]:
        url = _text(tunnel.url)
        where = f'<a href="{url}">{url}</a>' if tunnel.url.startswith(("http://", "https://")) else url
        served = "<br>".join(_server(one, links, tunnel.probes) for one in tunnel.connections[:MAX_LINKS])
        if len(tunnel.connections) > MAX_LINKS:
            served += f"<br>and {len(tunnel.connections) - MAX_LINKS} more links"
        if not served:
            served = '<span class="odd">nobody now; the name is held for its account</span>'
        yield (
            f'<tr><td><b>{_text(tunnel.name)}</b><br>{where}<td data-is="Served by">{served}'
            f'<td data-is="Account">{_text(tunnel.account_id)}'
        )
    yield "</tbody></table>"
    yield from _more(len(tunnels), "tunnels")


def _server(connection_id: str, links: dict[str, LinkStatistics], probes: dict[str, Any]) -> str:
    """One link of a tunnel, and whether its local service was there when that was last tried."""
    link, probe = links.get(connection_id), probes.get(connection_id)
    text = f"{_text(link.agent_id) if link else ''} <small>{_text(connection_id)}</small>"
    if probe is None:
        return f"{text} <small>not tried yet</small>"
    tried = f"<small>({probe['age_seconds']:.0f} s ago)</small>"
    if probe["up"]:
        return f'{text} <span class="ok">✓ local service is up</span> {tried}'
    return f'{text} <span class="bad">✗ {_text(probe["outcome"])}: {_text(probe["reason"])}</span> {tried}'


def _agents(links: Sequence[LinkStatistics], now: float) -> Iterable[str]:
    yield '<h2 id="agents">Agents and their links</h2>'
    if not links:
        yield "<p>No agent is connected.</p>"
        return
    has_workers = any(link.worker for link in links)
    yield (
        "<table><thead><tr><th>Agent<th>Address<th>Connected for<th>Round trip<th>Streams<th>State<th>Account"
        f"{'<th>Worker' if has_workers else ''}</thead><tbody>"
    )
    for link in links[:MAX_ROWS]:
        stalled = link.stalled_visitor + link.stalled_agent
        state = f'<span class="{"ok" if link.state == "connected" else "odd"}">{_text(link.state)}</span>'
        cells = {
            "Address": _text(link.remote),
            "Connected for": lasting(now - link.since),
            "Round trip": f"{link.rtt * 1000:.1f} ms" if link.rtt else "not known yet",
            "Streams": f"{link.streams}" + (f' <span class="odd">({stalled} stalled)</span>' if stalled else ""),
            "State": state,
            "Account": _text(link.account_id),
        }
        if has_workers:
            cells["Worker"] = f"{link.worker}"
        yield (
            f"<tr><td><b>{_text(link.agent_id)}</b> <small>{_text(link.connection_id)}</small>"
            + "".join(f'<td data-is="{name}">{text}' for name, text in cells.items())
        )
    yield "</tbody></table>"
    yield from _more(len(links), "links")


def _failures(failures: Sequence[FailedRequest], now: float) -> Iterable[str]:
    yield '<h2 id="failures">Failed and refused requests</h2>'
    if not failures:
        yield "<p>None since this core has started.</p>"
        return
    yield (
        '<p class="soft">The newest first. Put the request id of an error page, or of the answer\'s '
        "<code>X-Request-Id</code>, behind this page's address to find it: <code>#id</code>. Older ones are in the "
        'log, under the same id.</p>\n<ul class="failures">'
    )
    seen = set(_ANCHORS)
    for one in reversed(failures):
        anchor = "" if one.request_id in seen else one.request_id  # visitors may choose it, and may choose the same
        seen.add(anchor)
        yield _failure(one, anchor, now)
    yield "</ul>"


def _failure(one: FailedRequest, anchor: str, now: float) -> str:
    row = row_of(one.outcome, one.limit) if one.outcome in OUTCOMES else None
    kind, colour = ("failed", "bad") if one.failed else ("refused", "odd")
    request_id = f"<code>{_text(one.request_id)}</code>"
    answered = f"{one.status or ''} {'' if one.outcome == 'ok' else _text(one.outcome)}".strip()
    facts = {
        "whose side": _text((row.blames if row is not None else "") or one.side),
        "when": f"{_time(one.at)}, {lasting(now - one.at)} ago",
        "took": f"{one.milliseconds:.0f} ms",
        "tunnel": _text(one.tunnel),
        "agent": f"{_text(one.agent_id)} {_text(one.connection_id)}".strip(),
        "request id": f'<a href="#{quote(anchor, safe="")}">{request_id}</a>' if anchor else request_id,
        "trace id": f"<code>{_text(one.trace_id)}</code>" if one.trace_id else "",
        "worker": f"{one.worker}" if one.worker else "",
    }
    asked = f"{one.method} {one.host}{one.path}".strip(" -") or "(no request was read)"
    advice = f" <small>{_text(row.advice)}</small>" if row is not None and row.advice else ""
    return (
        f'<li class="{kind}"{f" id={chr(34)}{_text(anchor)}{chr(34)}" if anchor else ""}>'
        f'<b class="{colour}">{answered}</b> <code>{_text(asked, 2 * MAX_TEXT)}</code>'
        f"<p>{_text(one.error)}{advice}</p>"
        f"<small>{' · '.join(f'{name}: {text}' for name, text in facts.items() if text)}</small></li>"
    )


def _more(count: int, what: str) -> Iterable[str]:
    if count > MAX_ROWS:
        yield f'<p class="soft">{count - MAX_ROWS} more {what} are in the JSON.</p>'


def _fact(name: str, text: str, kind: str = "") -> str:
    return f'<div><dt>{name}</dt><dd class="{kind}">{text}</dd></div>'


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{_text(name)} {count}" for name, count in ordered)


def _text(value: str, most: int = MAX_TEXT) -> str:
    """For any place in the document, an attribute in double quotes too."""
    text = value if len(value) <= most else value[: most - 1] + "…"
    return escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _time(at: float) -> str:
    moment = time.gmtime(at)
    return (
        f'<time datetime="{time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)}">'
        f"{time.strftime('%Y-%m-%d %H:%M:%S', moment)} UTC</time>"
    )


def lasting(seconds: float) -> str:
    """ "12 s", "3 min 5 s", "2 h 40 min", "3 d 4 h"."""
    left = max(0, int(seconds))
    for size, unit, below, fine in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            rest = left % size // below
            return f"{left // size} {unit}" + (f" {rest} {fine}" if rest else "")
    return f"{left} s"
