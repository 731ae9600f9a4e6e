"""The core's own answers: what a visitor sees when no local service has answered.

One row of `tunnel.errors.OUTCOMES` becomes one answer: HTML for browsers, JSON for programs that ask for it, plain text
otherwise. Each says what happened, whose side it is on, the request id and what to try. The status line and the fields
are written by h11, from a connection that has not read a request: that is the state in which it lets a server answer a
head it could not parse, and it leaves the framing to us. What is constant is put together once, at import, since
a flood of requests for unknown names must stay cheap.
"""

from __future__ import annotations

import math
import re
import time
from email.utils import formatdate
from functools import lru_cache
from html import escape
from http import HTTPStatus

import h11
import msgspec

from tunnel.errors import Outcome, row_of

HTML, JSON, TEXT = "html", "json", "text"

#: asked for outright in Accept → the format; wildcards decide nothing, so `*/*` (curl) gets text
_FORMATS = {"text/html": HTML, "application/xhtml+xml": HTML, "application/json": JSON, "text/plain": TEXT}
_CONTENT_TYPES = {
    HTML: b"text/html; charset=utf-8",
    JSON: b"application/json",
    TEXT: b"text/plain; charset=utf-8",
}
_ALLOW = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # RFC 9110, 15.5.6: a 405 names what would do
_MAX_TEXT = 400  # characters of a host name or cause that are shown
_MAX_RETRY_AFTER = 31 * 86400  # seconds; a monthly quota is the longest wait there is
_STATIONS = ("visitor", "core", "agent", "local service")
_SIDES = {
    "visitor": "visitor (the request itself)",
    "core": "core (this server)",
    "agent": "agent (the program that connects the local service)",
    "local service": "local service (the program behind the agent)",
    "nobody": "nobody",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_IN_ID = re.compile(r"[^\x21-\x7e]")


def answer(
    outcome: str,
    *,
    request_id: str,
    accept: bytes = b"",
    method: str = "GET",
    host: str = "",
    detail: str = "",
    retry_after: float = 0,
    status: int = 0,
    http_version: str = "1.1",
    close: bool = False,
    limit: str = "",
) -> tuple[int, bytes, bytes]:
    """(status, head, body) of the answer for an outcome; write head + body as they are.

    accept: the request's Accept field(s), joined by commas. host: the name asked for, shown when it helps.
    detail: the particular cause, one line. retry_after: seconds; 429 and 503 always carry at least 1.
    status: where it differs from the table's. http_version: the request's; after 1.0 the connection closes.
    close: say so; the caller closes. The body is empty for HEAD; head and body are empty for a visitor who has left.
    limit: which one was reached, where it is not the outcome's usual one. Raises KeyError for an unknown outcome.
    """
    row = row_of(outcome, limit)
    code = status or row.status
    if code == 499:
        return code, b"", b""
    form = preferred(accept) if len(accept) <= 512 else _preferred(accept)
    shown_id = _NOT_IN_ID.sub("", request_id)[:128]
    values = {
        "request_id": shown_id,
        "host": _CONTROL.sub(" ", host[:_MAX_TEXT]),
        "detail": _CONTROL.sub(" ", detail[:_MAX_TEXT]),
    }
    body = _BODIES[form](row, code, values)
    headers = [
        _date(int(time.time())),
        (b"Content-Type", _CONTENT_TYPES[form]),
        (b"Content-Length", b"%d" % len(body)),
        *_constant_fields(row.name, code, form),
    ]
    if shown_id:
        headers.append((b"X-Request-Id", shown_id.encode()))
    if code in (429, 503):
        headers.append((b"Retry-After", b"%d" % _whole_seconds(retry_after)))
    if close or http_version == "1.0":
        headers.append((b"Connection", b"close"))
    head = h11.Connection(h11.SERVER).send(h11.Response(status_code=code, headers=headers, reason=_reason(code)))
    assert head is not None
    return code, head, b"" if method == "HEAD" else body


def _preferred(accept: bytes) -> str:
    """The format asked for outright with the highest q, the first of equals; else text (RFC 9110, 12.5.1)."""
    best, best_q = TEXT, 0.0
    for item in accept.lower().split(b",", 64)[:64]:
        media, _, parameters = item.partition(b";")
        form = _FORMATS.get(media.strip().decode("latin-1"))
        if form is None:
            continue
        q = _quality(parameters)
        if q > best_q:
            best, best_q = form, q
    return best


preferred = lru_cache(maxsize=256)(_preferred)


def _quality(parameters: bytes) -> float:
    for parameter in parameters.split(b";"):
        name, _, value = parameter.partition(b"=")
        if name.strip() == b"q":
            try:
                q = float(value)
            except ValueError:
                return 0.0
            return q if 0 <= q <= 1 else 0.0
    return 1.0


def _whole_seconds(seconds: float) -> int:
    return math.ceil(seconds) if 1 < seconds < _MAX_RETRY_AFTER else (_MAX_RETRY_AFTER if seconds > 1 else 1)


@lru_cache(maxsize=2)
def _date(second: int) -> tuple[bytes, bytes]:
    return b"Date", formatdate(second, usegmt=True).encode()


@lru_cache(maxsize=256)
def _constant_fields(outcome: str, code: int, form: str) -> tuple[tuple[bytes, bytes], ...]:
    fields = [
        (b"Cache-Control", b"no-store"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"X-Tunnel-Outcome", outcome.encode()),
    ]
    if form == HTML:
        fields.append((b"Content-Security-Policy", b"default-src 'none'; style-src 'unsafe-inline'"))
    if code == 405:
        fields.append((b"Allow", _ALLOW))
    return tuple(fields)


@lru_cache(maxsize=64)
def _reason(code: int) -> bytes:
    try:
        return HTTPStatus(code).phrase.encode()
    except ValueError:
        return b""


# Bodies. Each takes the row, the status and the shown values: request_id, host, detail (no control characters in them).


def _text(row: Outcome, code: int, values: dict[str, str]) -> bytes:
    lines = [f"{code} {row.name}: {row.title}"]
    if values["detail"]:
        lines.append(f"Cause: {values['detail']}")
    if values["host"]:
        lines.append(f"Host: {values['host']}")
    lines.append(f"Side: {row.blames or _SIDES[row.side]}")
    if row.advice:
        lines.append(f"Try: {row.advice}")
    lines.append(f"Request id: {values['request_id']}\n")
    return "\n".join(lines).encode()


def _json(row: Outcome, code: int, values: dict[str, str]) -> bytes:
    facts = {"outcome": row.name, "status": code, "title": row.title, "side": row.side, "advice": row.advice, **values}
    return msgspec.json.encode(facts) + b"\n"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#566072;--paper:#fbfbf9;--line:#c9ced6;--ok:#17703f;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#a3abb9;--paper:#15181d;--line:#3c434f;--ok:#6cc795;--bad:#ff8a80}}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,sans-serif}
main{max-width:40rem;margin:0 auto;padding:10vh 1.25rem 3rem}
h1{font-size:1.5rem;line-height:1.3;margin:.25rem 0 1rem}
.code,dt{color:var(--soft);font-size:.9rem}
ol{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem;margin:1.75rem 0;padding:0}
li{flex:1 1 7rem;border:2px solid var(--line);border-radius:.5rem;padding:.5rem .75rem}
li span{display:block;font-size:.85rem;color:var(--soft)}
.ok{border-color:var(--ok)}.ok span{color:var(--ok)}
.bad{border-color:var(--bad);border-style:dashed}.bad span{color:var(--bad);font-weight:600}
dd{margin:0 0 .75rem;overflow-wrap:anywhere}
code{font:.95em ui-monospace,monospace}
""".strip()


def _station(name: str, row: Outcome) -> str:
    """One box of the picture: what is known of it, seen from the core."""
    side = row.side
    mine, where = _STATIONS.index(name), _STATIONS.index(side) if side in _STATIONS else len(_STATIONS)
    if mine < where:
        mark, text = "ok", "✓ passed"
    elif mine == where:
        mark, text = "bad", "✗ too many together" if row.blames else "✗ it broke here"
    elif name == "core":
        mark, text = "ok", "✓ answered this"
    else:
        mark, text = "", "not known" if side == "agent" else "not reached"
    return f'<li class="{mark}">{name.capitalize()}<span>{text}</span></li>'


@lru_cache(maxsize=256)
def _html_parts(row: Outcome, code: int) -> tuple[str, str, str]:
    """What surrounds the cause and host, and the request id."""
    title, phrase = escape(row.title), _reason(code).decode()
    before = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="robots" content="noindex">\n'
        f"<title>{code} {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<p class="code">{code} {phrase} · <code>{row.name}</code></p>\n<h1>{title}</h1>\n'
        f'<ol aria-label="The way of the request">\n'
        + "\n".join(_station(station, row) for station in _STATIONS)
        + "\n</ol>\n<dl>\n"
    )
    between = f"<dt>Whose side</dt><dd>{escape((row.blames or _SIDES[row.side]).capitalize())}</dd>\n"
    if row.advice:
        between += f"<dt>What to try</dt><dd>{escape(row.advice)}</dd>\n"
    between += "<dt>Request id</dt><dd><code>"
    return before, between, "</code></dd>\n</dl>\n</main>\n</body>\n</html>\n"


def _html(row: Outcome, code: int, values: dict[str, str]) -> bytes:
    before, between, after = _html_parts(row, code)
    cause, host = values["detail"], values["host"]
    shown = f"<dt>Cause</dt><dd>{escape(cause)}</dd>\n" if cause else ""
    if host:
        shown += f"<dt>Host</dt><dd><code>{escape(host)}</code></dd>\n"
    return f"{before}{shown}{between}{escape(values['request_id'])}{after}".encode()


_BODIES = {HTML: _html, JSON: _json, TEXT: _text}
