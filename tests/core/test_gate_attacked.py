"""The gate under attack: what strangers may hold before they are known, and that agents get in all the same."""

import sys
from pathlib import Path

import pytest
import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parent))

from inprocess import until
from linking import socket_pair
from test_gate import Rig, rig

from tunnel.link.link import MAX_CONTROL
from tunnel.net import Socket
from tunnel.wire import control, frames

HANDSHAKE = (
    b"GET /link HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def masked(message: bytes, first: int = 0x82) -> bytes:
    """A WebSocket frame of a client, with a mask that changes nothing."""
    size = len(message)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65536:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    return head + bytes(4) + message


async def stranger(app: Rig, data: bytes, address: str = "192.0.2.66") -> Socket:
    """A connection that sends this; what is behind a handshake, after its answer (RFC 6455, 4.1)."""
    near, far = socket_pair()
    app.sockets += near, far
    app.nursery.start_soon(app.gate._serve, near, (address, 1))
    if data.startswith(HANDSHAKE) and data != HANDSHAKE:
        await far.send(HANDSHAKE)
        with trio.fail_after(10):
            assert (await far.recv()).startswith(b"HTTP/1.1 101 ")
        data = data.removeprefix(HANDSHAKE)
    app.nursery.start_soon(_send, far, data)
    return far


async def _send(socket: Socket, data: bytes) -> None:
    try:
        await socket.send(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # cut off while it still talked


async def rest(socket: Socket) -> bytes:
    """What comes until the connection ends, however that is."""
    data = b""
    with trio.fail_after(10):
        try:
            while part := await socket.recv():
                data += part
        except trio.BrokenResourceError:
            pass
    return data


TOO_MUCH = {
    "an endless request line": b"GET /" + b"x" * 300_000,
    "one long message": HANDSHAKE + masked(bytes(frames.MAX_MESSAGE)),
    "the beginning of one": HANDSHAKE + masked(bytes(frames.MAX_MESSAGE))[: frames.MAX_ATTACHING],
    "many fragments": HANDSHAKE + masked(b"x" * 1000, 0x02) + masked(b"x" * 1000, 0x00) * 300,
    "many pings": HANDSHAKE + masked(frames.frame(frames.PING, 0, bytes(16))) * 5000,
    "many reports": HANDSHAKE
    + masked(frames.frame(frames.HELLO, 0, b"{" + b" " * 60_000 + b"}"))
    + masked(frames.frame(frames.REPORT, 0, bytes(60_000))) * 4,
}


@pytest.mark.parametrize("name", TOO_MUCH)
async def test_a_stranger_may_say_little(name: str) -> None:
    async with rig() as app:
        socket = await stranger(app, TOO_MUCH[name])
        await rest(socket)
        await until(lambda: app.connects)
        assert (app.connects[0].outcome, app.connects[0].reason) in [("refused", "protocol"), ("link_lost", "")]
        assert not app.registry.links


async def test_what_is_too_much_is_counted() -> None:
    async with rig() as app:
        for name in ("one long message", "many fragments"):
            await rest(await stranger(app, TOO_MUCH[name]))
        await until(lambda: len(app.connects) == 2)
        assert app.refusals["attaching_bytes"] == 2
        assert app.gate.links.protocol_errors == 2


async def test_the_largest_hello_there_may_be_is_welcome() -> None:
    names = [f"n{number:02}" + "x" * 50 for number in range(100)]
    async with rig() as app:
        link, welcome = await app.welcomed(*names, agent_id="a" * 128, instance="i" * 1000)
        assert len(welcome.tunnels) == 100
        # From here on it may send what the protocol allows.
        link.session.control(frames.REPORT, b"x" * 60_000)
        link.session.control(frames.REPORT, b"y" * 60_000)
        await until(lambda: app.reports.all()[0].text[:1] == b"y")
        (agent,) = app.registry.links.values()
        assert len(agent.instance) == 128


async def test_silent_connections_give_way_to_agents() -> None:
    async with rig(max_attaching=50) as app:
        app.gate._auth_timeout = 60.0
        for _ in range(50):
            await stranger(app, b"")
        await until(lambda: app.gate._waiting.total == 50)
        with trio.fail_after(30):  # long before the silent ones have had their time
            for number in range(5):
                await app.welcomed(f"app{number}")  # from 192.0.2.5
        await until(lambda: app.refusals["attaching"] == 5)
        assert app.gate._waiting.total == 45


async def test_silent_connections_have_their_time() -> None:
    async with rig(max_attaching=50) as app:
        app.gate._auth_timeout = 0.5
        silent = [await stranger(app, b"") for _ in range(50)]
        for socket in silent:
            await rest(socket)
        await until(lambda: app.gate._waiting.total == 0)
        assert app.refusals["attaching_time"] == 50


async def test_too_many_handshakes_of_one_address() -> None:
    async with rig(max_handshakes=1) as app:
        for number in range(10):
            await app.welcomed(f"app{number}")
        socket = await stranger(app, HANDSHAKE, "192.0.2.5")
        assert await rest(socket) == b""
        assert app.refusals["handshakes"] == 1
        assert len(app.connects) == 10
        socket = await stranger(app, HANDSHAKE, "192.0.2.6")
        assert (await socket.recv()).startswith(b"HTTP/1.1 101")


async def test_wrong_tokens_wait_and_right_ones_do_not(autojump_clock: trio.testing.MockClock) -> None:
    async with rig() as app:
        waits = []
        for _ in range(8):
            began = trio.current_time()
            assert (await app.refused("app", token="bad")).reason == "bad_token"
            waits.append(trio.current_time() - began)
        assert max(waits[:3]) < 0.1
        assert waits[3] >= 0.25 and waits[4] >= 0.5 and waits[5] >= 1
        assert max(waits) < 3  # half of what the time to authenticate had left
        assert app.refusals["failed_logins"] == 5
        began = trio.current_time()
        await app.welcomed("app")  # from the same address
        assert trio.current_time() - began < 0.1


async def test_names_that_another_account_serves_stay_with_it() -> None:
    async with rig() as app:
        await app.welcomed("app")
        assert (await app.refused("other", "app", token="mallory")).reason == "name_taken"
        tunnel = app.registry.find("app.example.com")
        assert tunnel is not None and tunnel.account_id == "acme" and len(tunnel.links) == 1
        assert app.registry.find("other.example.com") is None
        assert app.accounts.accounts["mallory"].links == 0


# Agents that are in, and break the protocol --------------------------------------------------------------------------


BREACHES = {
    "a frame that is cut off": b"\x06nonsense",
    "a frame longer than its message": frames.HEADER.pack(frames.DATA, 0, 1, 0xFFFFFFFF),
    "an OPEN": frames.frame(frames.OPEN, 1, frames.pack_open(frames.Open(0, 0, 0, -1, b"", b""))),
    "an answer for a stream that was never opened": frames.frame(
        frames.RESPONSE, 7, frames.pack_response(frames.Response(200, 0, 0, 0, b"OK\r\n"))
    ),
    "body for a stream that was never opened": frames.frame(frames.DATA, 7, b"x"),
    "credit beyond the window": frames.frame(frames.WINDOW, 0, frames.WINDOW_BODY.pack(1)),
    "a ping of the wrong size": frames.frame(frames.PING, 0, b"x"),
    "a pong of the wrong size": frames.frame(frames.PONG, 0, b"x"),
    "a flood of pings": frames.frame(frames.PING, 0, bytes(16)) * 100,
    "a flood of control frames": frames.frame(frames.REPORT, 0, b"") * (MAX_CONTROL + 1),
    "a long control frame": frames.frame(frames.REPORT, 0, bytes(frames.MAX_TALK + 1)),
    "a welcome, with windows that hold the core's memory": frames.frame(
        frames.WELCOME, 0, control.encode(control.Welcome(1, "1", "c", "acme", "a", [], [], 2**31 - 1, 2**31 - 1))
    ),
    "a refusal": frames.frame(frames.REFUSED, 0, control.encode(control.RefusedMessage("protocol", "no"))),
}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_breach_ends_the_link_with_a_code_and_a_reason(name: str) -> None:
    async with rig() as app:
        other, _ = await app.welcomed("other", token="other")
        link, _ = await app.welcomed("app")
        link.session._queue(BREACHES[name])
        with trio.fail_after(10):
            await link.ended.wait()
        assert link.end_reason.startswith("closed by the other end (1002 the other end broke the link protocol: ")
        await until(lambda: app.links)
        assert app.links[0].outcome == "link_lost"
        assert app.links[0].error.startswith("the other end broke the link protocol: ")
        assert app.gate.links.protocol_errors == 1
        assert not other.end_reason and len(app.registry.links) == 1


WEBSOCKET_BREACHES = {
    "text": masked(b"hello", 0x81),
    "a reserved opcode": masked(b"hello", 0x83),
    "no mask": b"\x82\x01x",
    "too long": masked(bytes(frames.MAX_MESSAGE + 1)),
}


@pytest.mark.parametrize("name", WEBSOCKET_BREACHES)
async def test_a_breach_below_the_frames_is_counted_too(name: str) -> None:
    async with rig() as app:
        hello = control.Hello([1], "1", "a", "acme", [control.TunnelRequest("app")])
        socket = await stranger(app, HANDSHAKE + masked(frames.frame(frames.HELLO, 0, control.encode(hello))))
        await until(lambda: app.registry.links)
        await until(lambda: app.registry.links)
        app.nursery.start_soon(_send, socket, WEBSOCKET_BREACHES[name])
        said = await rest(socket)
        await until(lambda: app.links)
        assert app.gate.links.protocol_errors == 1
        assert app.links[0].error.startswith("the other end broke the link protocol: ")
        code = 1009 if name == "too long" else 1002
        if name != "too long":  # there the rest of the message may meet a closed socket, whose reset overtakes
            assert b"\x88" in said and code.to_bytes(2, "big") in said
