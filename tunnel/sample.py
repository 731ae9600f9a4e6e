"""The small local service that `tunnel up` starts when it is given none: it shows what came through the tunnel.

On its own: `python -m tunnel.sample 3000` (loopback), `:3000` (all interfaces) or `HOST:3000`.

`/` explains itself, `/events` is a stream of server-sent events (one a second), and every other path echoes the
request: as a page for browsers, as text otherwise. No more of a server than that needs.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from html import escape

import h11
import trio

MAX_HEAD = 64 * 1024  # bytes; the core accepts as much
IDLE = 75.0  # seconds between requests on a connection
INTERVAL = 1.0  # seconds between events

HELP = """\
usage: python -m tunnel.sample [PORT | :PORT | HOST:PORT]

A small HTTP service to try a tunnel with: / explains itself, /events is a stream of server-sent events, every other
path echoes the request. PORT (default: 3000) listens on loopback only, :PORT on all interfaces. Ctrl-C ends it."""

_STYLE = (
    ":root{color-scheme:light dark}body{max-width:44rem;margin:8vh auto;padding:0 1.25rem;font:1rem/1.55 system-ui,"
    "sans-serif}pre{overflow:auto;padding:1rem;border:1px solid #8886;border-radius:.5rem;font-size:.85rem}"
    "h1{font-size:1.5rem}code{font-size:.95em}"
)
_SCRIPT = (
    "const out=document.getElementById('events');"
    "new EventSource('/events').onmessage=e=>{out.textContent=e.data+'\\n'+out.textContent.slice(0,400)}"
)


async def serve_sample(
    port: int = 0,
    host: str | None = "127.0.0.1",
    *,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, on all interfaces for host None; `nursery.start` returns (host, port). Raises OSError."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    address = listeners[0].socket.getsockname()
    task_status.started((address[0], address[1]))
    await trio.serve_listeners(serve_connection, listeners)


async def serve_connection(stream: trio.abc.Stream) -> None:
    """One connection, request after request. A client that goes, idles or speaks no HTTP ends it."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    async with stream:
        try:
            while True:
                with trio.move_on_after(IDLE) as waiting:
                    request = await _next_event(conn, stream)
                if waiting.cancelled_caught or not isinstance(request, h11.Request):
                    return
                await _answer(conn, stream, request)
                if conn.our_state is not h11.DONE or conn.their_state is not h11.DONE:
                    return
                conn.start_next_cycle()
        except h11.RemoteProtocolError as exc:
            await _send_error(conn, stream, exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def _next_event(conn: h11.Connection, stream: trio.abc.Stream) -> h11.Event | type[h11.PAUSED]:
    while True:
        event = conn.next_event()
        if event is not h11.NEED_DATA:
            assert not isinstance(event, type) or event is h11.PAUSED
            return event
        if conn.they_are_waiting_for_100_continue:
            await _send(conn, stream, h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        conn.receive_data(bytes(await stream.receive_some(64 * 1024)))


async def _send(conn: h11.Connection, stream: trio.abc.Stream, *events: h11.Event) -> None:
    data = b"".join(conn.send(event) or b"" for event in events)
    if data:
        await stream.send_all(data)


async def _send_error(conn: h11.Connection, stream: trio.abc.Stream, exc: h11.RemoteProtocolError) -> None:
    if conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        try:
            await _send_page(conn, stream, "this is no valid request\n", "text/plain", exc.error_status_hint)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def _answer(conn: h11.Connection, stream: trio.abc.Stream, request: h11.Request) -> None:
    path = request.target.partition(b"?")[0]
    size = 0
    while isinstance(event := await _next_event(conn, stream), h11.Data):
        size += len(event.data)
    if path == b"/events" and request.method == b"GET":
        await _send_events(conn, stream)
        return
    accept = b",".join(value for name, value in request.headers if name == b"accept")
    echo = show_request(request, size)
    text, media = echo, "text/plain"
    if b"text/html" in accept.lower():
        text, media = welcome_page(echo) if path == b"/" else echo_page(echo), "text/html"
    await _send_page(conn, stream, text, media, bare=request.method == b"HEAD")


async def _send_page(
    conn: h11.Connection, stream: trio.abc.Stream, text: str, media: str, status: int = 200, bare: bool = False
) -> None:
    """bare: the head only, for HEAD."""
    body = text.encode()
    headers = [
        ("Content-Type", f"{media}; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ]
    data = [] if bare else [h11.Data(data=body)]
    await _send(conn, stream, h11.Response(status_code=status, headers=headers), *data, h11.EndOfMessage())


async def _send_events(conn: h11.Connection, stream: trio.abc.Stream) -> None:
    """Events until the visitor leaves: a write fails then, within an interval or two."""
    headers = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")]
    await _send(conn, stream, h11.Response(status_code=200, headers=headers))
    number = 0
    while True:
        number += 1
        event = f"id: {number}\ndata: event {number} at {time.strftime('%H:%M:%S')}\n\n"
        await _send(conn, stream, h11.Data(data=event.encode()))
        await trio.sleep(INTERVAL)


def show_request(request: h11.Request, size: int) -> str:
    """The request as text: its line and fields as they arrived, and the size of its body in bytes."""
    lines = [f"{request.method.decode()} {request.target.decode('latin-1')} HTTP/{request.http_version.decode()}"]
    lines += [f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in request.headers.raw_items()]
    lines += ["", f"({size} bytes of body)"]
    return "\n".join(lines) + "\n"


def _page(title: str, inner: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{inner}</body>\n</html>\n"
    )


def echo_page(echo: str) -> str:
    """A request, echoed as HTML."""
    return _page("What the local service received", f'<pre>{escape(echo)}</pre>\n<p><a href="/">Back</a></p>\n')


def welcome_page(echo: str) -> str:
    """What is going on here, as HTML."""
    return _page(
        "The tunnel works",
        "<p>This page comes from a small sample service that listens on loopback only. Your browser asked the core, "
        "the core passed the request over the link to the agent, and the agent asked this service.</p>\n"
        "<p>To serve your own: <code>tunnel up 3000</code>, with the port it listens on.</p>\n"
        "<h2>Your request, as it arrived here</h2>\n"
        f"<pre>{escape(echo)}</pre>\n"
        '<p>Any other path echoes the request too: <a href="/any/path?a=1">/any/path?a=1</a>.</p>\n'
        '<h2>Events, one a second, from <a href="/events">/events</a></h2>\n'
        f'<pre id="events" aria-live="off"></pre>\n<script>{_SCRIPT}</script>\n',
    )


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT. Exit code 2 when the address is wrong or taken."""
    if argv and argv[0] in ("-h", "-help", "--help"):
        print(HELP)
        return 0
    where = argv[0] if argv else "3000"
    host, colon, port = where.rpartition(":")
    if len(argv) > 1 or not port.isascii() or not port.isdigit() or int(port) > 65535:
        print(
            f"tunnel sample: {where!r} is no address; write 3000, :3000 (all interfaces) or HOST:3000", file=sys.stderr
        )
        return 2
    try:
        trio.run(_serve_until_stopped, int(port), host or (None if colon else "127.0.0.1"))
    except ExceptionGroup as group:  # of the nursery: the listener's one error
        exc = group.exceptions[0]
        if not isinstance(exc, OSError):
            raise
        print(f"tunnel sample: can't listen on {where} ({exc.strerror}); choose another address", file=sys.stderr)
        return 2
    return 0


async def _serve_until_stopped(port: int, host: str | None) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            listening = await nursery.start(serve_sample, port, host)
            print(f"sample service on http://{listening[0]}:{listening[1]}", flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
