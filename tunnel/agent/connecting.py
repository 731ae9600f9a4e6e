"""From dialling a core to its welcome: TCP, TLS and the pin, WebSocket, hello. All of it has one deadline."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

import trio
import trio_websocket

from tunnel import __version__
from tunnel.agent import dialing
from tunnel.agent.attempt import Connecting
from tunnel.agent.racing import Race, Try
from tunnel.config import AgentSettings, LocalService, parse_address
from tunnel.errors import Refused, TunnelError, WireError
from tunnel.link import transport
from tunnel.link.tasks import open_pair
from tunnel.link.websocket import OnMessage
from tunnel.log import get_logger
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, RefusedMessage, TunnelRequest, Welcome

log = get_logger("tunnel.agent")

SILENCE = 2.0  #: seconds for a core's WebSocket to answer a ping before the welcome, and half a second between two
CONNECT_TIMEOUT = 10.0  #: seconds from dialling to the welcome

_Reached = tuple[transport.Transport, dict[str, float]]  # a WebSocket to the core, and when its parts were there


class Connector:
    """on_welcome hears of a welcome within the visit. instance, process: what makes links those of one agent, and tells
    the processes apart that are one agent together. most_window: the largest window that a link may have. Raises
    ConfigError for TLS that can't work."""

    def __init__(
        self,
        settings: AgentSettings,
        agent_id: str,
        locals: Sequence[LocalService],
        on_welcome: Callable[[Connecting, Welcome], None],
        *,
        instance: str,
        process: int,
        most_window: int,
    ) -> None:
        self._settings = settings
        self._agent_id = agent_id
        self._locals = locals
        self._on_welcome = on_welcome
        self._instance = instance
        self._process = process
        self._most_window = most_window
        #: by the worker of the core that is asked for
        self._tls: dict[int | None, ssl.SSLContext | None] = {None: dialing.tls_context(settings)}

    async def connect(self, visit: Connecting) -> None:
        """The innermost handler of a connect visit. Raises Refused, TunnelError."""
        attempt = visit.attempt
        attempt.traced = visit.trace_fields
        (log.info if attempt.is_told else log.debug)(
            "connecting to server", server=self._settings.server, **attempt.traced
        )
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                carrier = await self._dial(visit)
                await self._introduce(visit, carrier)
            visit.outcome = "ok"
        except trio.TooSlowError:
            visit.outcome, visit.error = "timeout", "the core did not answer in time"
            raise TunnelError(f"{visit.error} ({CONNECT_TIMEOUT:g} s)") from None
        except Refused as exc:
            visit.outcome, visit.reason, visit.error = "refused", exc.reason, str(exc)
            raise
        except TunnelError as exc:
            visit.outcome, visit.error = "link_lost", str(exc)
            raise

    async def _dial(self, visit: Connecting) -> transport.Transport:
        """A WebSocket, from one of the tries at it (tunnel/agent/racing.py); only that one goes on to the hello."""
        race: Race[_Reached] = Race(visit.nursery, partial(self._reach, visit.link.on_message, visit.worker))
        carrier, marks = await race.win()
        visit.marks.update(marks)
        visit.nursery.start_soon(visit.link.run, carrier)
        return carrier

    async def _reach(self, on_message: OnMessage, worker: int | None, one: Try[_Reached]) -> None:
        """worker: of the core, that the connection is meant for."""
        host, port = parse_address(self._settings.server)
        if worker not in self._tls:
            self._tls[worker] = dialing.tls_context(self._settings, worker)
        tls = self._tls[worker]
        socket = await dialing.dial_core(host, port)
        try:
            marks = {"dialed": monotonic()}
            one.step()
            if tls is not None:
                socket = await dialing.secure(socket, tls, host, self._settings)
                marks["tls"] = monotonic()
                one.step()
            query = "" if worker is None else f"worker={worker}"
            async with open_pair() as nursery:
                carrier = await transport.connect(nursery, socket, host, on_message, query=query)
                marks["websocket"] = monotonic()
                if one.arrive((carrier, marks)):
                    await trio.sleep_forever()  # its reader runs until the attempt is over
                nursery.cancel_scope.cancel()
        except (trio_websocket.HandshakeError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise TunnelError(dialing.explain_handshake(self._settings, exc)) from exc
        finally:
            socket.close()

    async def _introduce(self, visit: Connecting, carrier: transport.Transport) -> None:
        hello = Hello(
            [frames.VERSION],
            __version__,
            self._agent_id,
            self._settings.token,
            [
                TunnelRequest(one.name, "tcp" if one.scheme == "tcp" else "http", f"{one.scheme}://{one.address}")
                for one in self._locals
            ],
            self._instance,
            visit.attempt.max_streams,
            [control.WORKERS],
            f"{self._process}.{visit.slot.number}",
            self._most_window,
            self._settings.drain_timeout,
        )
        visit.link.session.control(frames.HELLO, control.encode(hello))
        try:
            async with open_pair() as nursery:
                nursery.start_soon(_watch_silence, carrier)
                kind, payload = await visit.link.receive_control()
                nursery.cancel_scope.cancel()
            if kind == frames.REFUSED:
                refusal = control.decode(RefusedMessage, payload)
                raise Refused(refusal.reason, refusal.text, refusal.retry_after)
            if kind != frames.WELCOME:
                raise WireError(f"the core answered the hello with {frames.NAMES[kind]}")
            welcome = control.decode(Welcome, payload)
        except trio.EndOfChannel:
            raise TunnelError(f"the link ended before the core's welcome: {visit.link.end_reason}") from None
        if welcome.version != frames.VERSION:
            raise WireError(f"the core chose link protocol {welcome.version}, which this agent did not offer")
        if len(welcome.tunnels) != len(self._locals):
            raise WireError("the core's welcome names another number of tunnels")
        visit.account_id, visit.connection_id = welcome.account_id, welcome.connection_id
        visit.agent_id = self._agent_id
        visit.marks["authenticated"] = monotonic()
        self._on_welcome(visit, welcome)


async def _watch_silence(carrier: transport.Transport) -> None:
    """Until cancelled: a welcome may take its time, but the core's WebSocket answers at once, or the connection has
    broken without a word. Raises TunnelError."""
    while True:
        with trio.move_on_after(SILENCE) as scope:
            await carrier.ping()
        if scope.cancelled_caught:
            raise TunnelError("the core has fallen silent before its welcome")
        await trio.sleep(0.5)
