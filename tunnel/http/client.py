"""Connections to local services: dialled late, kept while idle, used again when they are still good."""

from __future__ import annotations

import ssl
from collections import deque
from time import monotonic

import trio

from tunnel.errors import Failure
from tunnel.http.redirects import LOOPBACK, Redirects
from tunnel.net import OUR_OWN_TROUBLE, Socket, dial, is_loopback, reason_of, with_tls
from tunnel.trust import explain_refusal

CONNECT_TIMEOUT = 10.0  #: seconds to a connection, TLS included
IDLE_TIMEOUT = 30.0  #: seconds; many servers close theirs after 60 or 75
#: what OpenSSL says of an answer that is no record of TLS
NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
LOOK_TIMEOUT = 1.0  #: seconds for a look whether a service speaks TLS
LOOK_AGAIN = 15.0  #: seconds
SWEEP = 1.0  #: seconds between looks at what is idle
MAX_IDLE = 128  #: idle connections kept for one service


class Service:
    """One local service and its idle connections. `secure`: TLS, verified unless the service is on loopback.

    host_header: what it gets as Host: "local" for its own address, or a name; empty: what the visitor typed.
    """

    def __init__(self, host: str, port: int, secure: bool, host_header: str = "") -> None:
        self.host = host
        self.port = port
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._idle: deque[tuple[Socket, float]] = deque()
        self._swept = 0.0
        self.scheme = "https" if secure else "http"
        own = self.address.removesuffix(":443" if secure else ":80")  # as a browser writes it
        self.host_header = own if host_header == "local" else host_header
        self.redirects = self._make_redirects() if host_header else None
        self._tls = _tls_context(host) if secure else None
        self.has_answered = False  # ever, in the terms that it was given in; a 400 is no proof
        self._is_tls = False
        self._looked = -LOOK_AGAIN

    def _make_redirects(self) -> Redirects:
        names = LOOPBACK if is_loopback(self.host) else ()
        return Redirects(self.scheme, [self.host_header, self.address, *(f"{name}:{self.port}" for name in names)])

    def take_idle(self) -> Socket | None:
        """A kept connection that is still good, the most recently used first.

        It is looked at each time: what a service sent beyond its last answer must not become the next visitor's.
        """
        while self._idle:
            socket, since = self._idle.pop()
            if monotonic() - since < IDLE_TIMEOUT and not socket.is_stale():
                return socket
            socket.close()
        return None

    def keep(self, socket: Socket) -> None:
        self._idle.append((socket, monotonic()))
        if len(self._idle) > MAX_IDLE:
            self._idle.popleft()[0].close()

    async def connect(self) -> Socket:
        """A new connection. Raises Failure(local_refused) that says what did not work."""
        is_reached = False
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                socket = await dial(self.host, self.port)
            except OSError as exc:
                if reason_of(exc) in OUR_OWN_TROUBLE:
                    raise Failure("overloaded", f"the agent can't open a connection: {reason_of(exc)}") from exc
                raise Failure("local_refused", f"can't connect to {self.address}: {reason_of(exc)}") from exc
            if self._tls is None:
                return socket
            is_reached = True
            try:
                socket = with_tls(socket, self._tls, server_side=False, server_name=self.host)
                await socket.handshake()
            except (ssl.SSLError, trio.BrokenResourceError) as exc:
                socket.close()
                raise Failure("local_refused", f"TLS with {self.address} failed: {self._explain(exc)}") from exc
            except BaseException:
                socket.close()
                raise
            return socket
        if is_reached:
            plain = f"a service without TLS is given as http://{self.address}"
            raise Failure("local_refused", f"{self.address} does not answer TLS within {CONNECT_TIMEOUT:g} s; {plain}")
        raise Failure("local_refused", f"can't connect to {self.address} within {CONNECT_TIMEOUT:g} s")

    async def is_tls_unawares(self) -> bool:
        """Whether a service that was given without TLS, and has never answered, speaks it.

        Node, Python and others say nothing to who speaks plain HTTP to their TLS: they close the connection. So they
        are asked, now and then.
        """
        if self._tls is not None or self.has_answered:
            return False
        if monotonic() - self._looked >= LOOK_AGAIN:
            self._looked = monotonic()
            self._is_tls = False
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # nothing is sent
            with trio.move_on_after(LOOK_TIMEOUT):
                self._is_tls = await self._can_shake_hands(context)
        return self._is_tls

    async def _can_shake_hands(self, context: ssl.SSLContext) -> bool:
        try:
            socket = await dial(self.host, self.port)
        except OSError:
            return False
        try:
            socket = with_tls(socket, context, server_side=False, server_name=self.host)
            await socket.handshake()
        except (ssl.SSLError, trio.BrokenResourceError):
            return False
        finally:
            socket.close()
        return True

    def _explain(self, exc: BaseException) -> str:
        """Why there is no TLS; a service that speaks plain HTTP answers in it, or closes the connection."""
        if isinstance(exc, ssl.SSLError) and exc.reason in NO_TLS:
            return f"it does not speak TLS; give it as http://{self.address}"
        if refusal := explain_refusal(exc, self.host):
            return f"its certificate is not trusted: {refusal}"
        reason = reason_of(exc)
        if isinstance(exc, ssl.SSLEOFError | trio.BrokenResourceError):
            return f"{reason}; a service without TLS is given as http://{self.address}"
        return reason

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop()[0].close()

    def tick(self, now: float) -> None:
        """Called by the sweeper."""
        if now - self._swept >= SWEEP:
            self._swept = now
            self.sweep(now)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long, and what the service has closed: neither end has files to spare."""
        for _ in range(len(self._idle)):
            socket, since = self._idle.popleft()
            if now - since >= IDLE_TIMEOUT or socket.is_stale():
                socket.close()
            else:
                self._idle.append((socket, since))


def _tls_context(host: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if is_loopback(host):
        # A development server's own certificate proves nothing there, and nobody is in between.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
