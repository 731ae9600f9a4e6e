"""A small server for the program's own pages: metrics, health, status. GET and HEAD, nothing else.

It is not on the public side, yet in a cluster anybody may reach its port: heads are bounded, every wait has a
time-out, connections are limited and silent ones give way (tunnel/http/places.py), and a request with a body is
answered without reading it. A page that raises gives 500 and one line of log, and the next request finds the server as
it was.

One task a connection. Pages are looked up for every request, so the caller may add some while it serves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from email.utils import formatdate

import h11
import trio

from tunnel.handler import Page, PageAnswer, PageRequest, no_such_page
from tunnel.http.hosts import is_fitting
from tunnel.http.places import Place, Places

MAX_HEAD = 16 * 1024  # bytes of a request's head
MAX_CONNECTIONS = 256  # a scraper or two, some probes, a browser
HEAD_TIMEOUT = 10.0  # seconds from the first byte of a head to its last, and to the first byte on a new connection
IDLE_TIMEOUT = 75.0  # seconds between requests: more than a scrape interval of a minute
PAGE_TIMEOUT = 30.0  # seconds for a page to be made
SEND_TIMEOUT = 30.0  # seconds for an answer to be taken
LINGER_TIMEOUT = 1.0  # seconds to let a client read its answer before unread bytes of its own reset the connection
RECEIVE = 16 * 1024

log = logging.getLogger("tunnel.http")


async def serve_pages(
    listeners: list[trio.SocketListener],
    pages: Mapping[str, Page],
    nursery: trio.Nursery | None = None,
    *,
    bound: str = "",
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve pages by path until cancelled; the listeners are closed then.

    nursery: owns the connections instead of this call, for a caller who wants to stop accepting before it ends them.
    bound: the address that it listens on, where requests for other names are to be refused (`tunnel.http.hosts`).
    `nursery.start` returns the listeners. Raises OSError if one of them breaks.
    """
    server = _Server(pages, bound)
    await trio.serve_listeners(server.serve, listeners, handler_nursery=nursery, task_status=task_status)


class _Server:
    def __init__(self, pages: Mapping[str, Page], bound: str) -> None:
        self._pages = pages
        self._bound = bound
        self._places = Places(MAX_CONNECTIONS)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection to its end. Never raises: one visitor's trouble is nobody else's."""
        try:
            with Place(self._places, _address_of(stream)) as place:
                if place.is_given:
                    await self._requests(stream, place)
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # the client has gone, or does not read
        except Exception as exc:
            _report("page connection failed", exc)

    async def _requests(self, stream: trio.SocketStream, place: Place) -> None:
        conn = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        patience = HEAD_TIMEOUT
        while True:
            try:
                request = await _receive_request(conn, stream, place, patience)
            except h11.RemoteProtocolError as exc:
                answer = _line(exc.error_status_hint, "this is no valid request")
                await _send(conn, stream, place, answer, False, True)
                await _linger(stream, place)
                return
            if request is None:
                return
            unread = _has_unread_body(conn)
            answer = await self._answer(request)
            await _send(conn, stream, place, answer, request.method == b"HEAD", unread)
            if unread:
                await _linger(stream, place)
            if conn.our_state is not h11.DONE or conn.their_state is not h11.DONE:
                return
            conn.start_next_cycle()
            patience = IDLE_TIMEOUT

    async def _answer(self, request: h11.Request) -> PageAnswer:
        path, _, query = request.target.decode("latin-1").partition("?")
        headers: dict[str, str] = {}
        for raw_name, raw_value in request.headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if not is_fitting(self._bound, headers.get("host", ""), headers.get("origin", "")):
            return _line(403, "this page is not served under this name, or not to another site")
        page = self._pages.get(path)
        if page is None:
            return no_such_page(self._pages)
        if request.method not in (b"GET", b"HEAD"):
            return _line(405, "this page can only be read", {"Allow": "GET, HEAD"})
        try:
            with trio.fail_after(PAGE_TIMEOUT):
                answer = await page(PageRequest(path, query, headers))
            _head(answer, False)  # a page that asks for impossible fields breaks here, where it can still be answered
        except Exception as exc:
            _report("page failed", exc, path=path)
            return _line(500, "this page broke; the log has the details")
        return answer


def _address_of(stream: trio.SocketStream) -> str:
    try:
        address: str = stream.socket.getpeername()[0]
    except OSError:  # it has gone already
        return ""
    return address


async def _receive_request(
    conn: h11.Connection, stream: trio.SocketStream, place: Place, patience: float
) -> h11.Request | None:
    """The next request, or None when the client is done. Raises h11.RemoteProtocolError, TooSlowError."""
    event = conn.next_event()
    if event is h11.NEED_DATA:
        with place.waiting(patience):
            conn.receive_data(await stream.receive_some(RECEIVE))
        event = conn.next_event()
    with place.waiting(HEAD_TIMEOUT):
        while event is h11.NEED_DATA:
            conn.receive_data(await stream.receive_some(RECEIVE))
            event = conn.next_event()
    return event if isinstance(event, h11.Request) else None


def _has_unread_body(conn: h11.Connection) -> bool:
    try:
        return not isinstance(conn.next_event(), h11.EndOfMessage)
    except h11.RemoteProtocolError:
        return True


def _head(answer: PageAnswer, close: bool) -> h11.Response:
    headers = {
        "Date": formatdate(usegmt=True),
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        **answer.headers,
    }
    if close:
        headers["Connection"] = "close"
    return h11.Response(status_code=answer.status, headers=list(headers.items()))


async def _send(
    conn: h11.Connection, stream: trio.SocketStream, place: Place, answer: PageAnswer, head_only: bool, close: bool
) -> None:
    data = conn.send(_head(answer, close)) or b""
    if not head_only:
        data += conn.send(h11.Data(data=answer.body)) or b""
    data += conn.send(h11.EndOfMessage()) or b""
    with place.waiting(SEND_TIMEOUT):
        await stream.send_all(data)


async def _linger(stream: trio.SocketStream, place: Place) -> None:
    with place.waiting(LINGER_TIMEOUT):
        await stream.send_eof()
        while await stream.receive_some(RECEIVE):
            pass


def _line(status: int, text: str, headers: dict[str, str] | None = None) -> PageAnswer:
    return PageAnswer(status, f"{text}\n".encode(), headers=headers or {})


def _report(message: str, exc: Exception, **fields: str) -> None:
    log.error(message, extra={"fields": {**fields, "error": f"{type(exc).__name__}: {exc}"}})
