"""Plain trio-websocket is the reference: with the tap at either end or both come the same messages and ends."""

import select
import socket
import ssl
import struct
from itertools import product

import pytest
import trio
import trio_websocket
import trustme
from linking import Ends, Way, socket_pair, transports
from trio.testing import wait_all_tasks_blocked

from tunnel.errors import WireError
from tunnel.link import transport
from tunnel.link.tap import Tap
from tunnel.link.websocket import MASKS
from tunnel.net import Socket, with_tls
from tunnel.ready import make_ready
from tunnel.wire.frames import MAX_MESSAGE

SIZES = (0, 1, 125, 126, 65_535, 65_536, 200_000)
MESSAGES = [bytes([size % 251]) * size for size in SIZES]
COMBINATIONS = list(product([False, True], repeat=2))
combinations = pytest.mark.parametrize(("core_tapped", "agent_tapped"), COMBINATIONS)
tapped = pytest.mark.parametrize("core_tapped", [False, True], ids=["plain", "tapped"])
KEY = b"\x01\x02\x03\x04"


@pytest.fixture(autouse=True, params=["by tasks", "told by a task", "told by the run loop"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of these hold whoever reads what comes."""
    if request.param == "by tasks":
        return
    if not hasattr(select, "epoll"):
        pytest.skip("nobody tells without epoll")
    in_front = request.param == "told by the run loop"
    monkeypatch.setattr(Way, "make", lambda: make_ready(_fail, in_front))


def _fail(exc: Exception) -> None:
    raise exc


async def send_all(end: transport.Transport, messages: list[bytes]) -> None:
    for message in messages:
        await end.send(message)


@combinations
@pytest.mark.parametrize("singles", [None, 40, 1000], ids=["straight", "split", "bytewise"])
async def test_messages_of_all_sizes_both_ways(core_tapped: bool, agent_tapped: bool, singles: int | None) -> None:
    async with transports(core_tapped, agent_tapped, singles) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(send_all, ends.core, MESSAGES)
        nursery.start_soon(send_all, ends.agent, MESSAGES)
        await ends.until(lambda: len(ends.to_core) == len(ends.to_agent) == len(SIZES))
        assert ends.to_core == ends.to_agent == MESSAGES


@pytest.mark.parametrize("client", [False, True])
async def test_the_tap_sees_the_same_whatever_the_cuts(client: bool) -> None:
    """One byte at a time, and every other way to cut two messages and a ping."""
    key = b"" if client else KEY
    data = _frame(0x82, b"first", key) + _frame(0x89, b"ping", key) + _frame(0x82, b"x" * 300, key)
    for at in range(len(data) + 1):
        for pieces in ([data[:at], data[at:]], [data[:at], *(data[n : n + 1] for n in range(at, len(data)))]):
            found, rest = _cut(client, pieces)
            assert found == [b"first", b"x" * 300]
            assert rest == _frame(0x89, b"ping", key)


def _cut(client: bool, pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    one, other = socket_pair()
    one.close()
    other.close()
    tap = Tap(other, client)
    found: list[bytes] = []
    tap.on_message = found.append
    rest = b""
    for piece in pieces:
        rest += tap._add(piece)
    return found, rest


# What is not a whole binary message -----------------------------------------------------------------------------------


def _mask(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[at % 4] for at, byte in enumerate(data)) if key else data


def _frame(first: int, payload: bytes, key: bytes = KEY, size: int | None = None) -> bytes:
    """A WebSocket frame as RFC 6455 has it; size: the length to be claimed."""
    size = len(payload) if size is None else size
    bit = 0x80 if key else 0
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65_536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    return head + key + _mask(payload, key)


class Raw:
    """A client that shook hands and then writes what it likes."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.socket: Socket = ends.agent.socket

    async def send(self, data: bytes) -> None:
        await self.socket.send(data)


BINARY, TEXT, CONTINUED, FIN, PING, CLOSE = 0x02, 0x01, 0x00, 0x80, 0x89, 0x88


@tapped
async def test_fragments_make_one_message_and_keep_their_place(core_tapped: bool) -> None:
    async with transports(core_tapped, False) as ends:
        data = (
            _frame(FIN | BINARY, b"one")
            + _frame(BINARY, b"tw")
            + _frame(PING, b"in between")
            + _frame(CONTINUED, b"")
            + _frame(FIN | CONTINUED, b"o")
            + _frame(FIN | BINARY, b"three")
        )
        await Raw(ends).send(data)
        await ends.until(lambda: len(ends.to_core) == 3)
        await Raw(ends).send(_frame(FIN | BINARY, b"four"))
        await ends.until(lambda: len(ends.to_core) == 4)
        assert ends.to_core == [b"one", b"two", b"three", b"four"]


@combinations
async def test_pings_are_answered_on_the_way(core_tapped: bool, agent_tapped: bool) -> None:
    async with transports(core_tapped, agent_tapped) as ends:
        with trio.fail_after(10):
            await ends.core.send(b"before")
            await ends.core._ws.ping(b"p")
            await ends.agent._ws.ping(b"q")
            await ends.core.send(b"after")
        await ends.until(lambda: len(ends.to_agent) == 2)
        assert ends.to_agent == [b"before", b"after"]


def tls_pair() -> tuple[Socket, Socket]:
    """The server's and the client's end, before their handshake."""
    authority = trustme.CA()
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("core.test").configure_cert(server_context)
    authority.configure_trust(client_context)
    near, far = socket_pair()
    return (
        with_tls(near, server_context, server_side=True),
        with_tls(far, client_context, server_side=False, server_name="core.test"),
    )


async def test_over_tls_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read gives one record, and behind it there may be more that the kernel knows nothing of."""
    near, far = tls_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.handshake)
        nursery.start_soon(far.handshake)
    monkeypatch.setattr(Way, "pair", lambda: (near, far))
    async with transports(True, True) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(send_all, ends.core, MESSAGES)
        nursery.start_soon(send_all, ends.agent, MESSAGES)
        await ends.until(lambda: len(ends.to_core) == len(ends.to_agent) == len(SIZES))
        assert ends.to_core == ends.to_agent == MESSAGES
        big = [b"b" * MAX_MESSAGE for _ in range(4)]
        nursery.start_soon(send_all, ends.core, big)
        await ends.until(lambda: len(ends.to_agent) == len(SIZES) + 4)
        assert ends.to_agent[-4:] == big
        await ends.core.close("over")
        await ends.until(lambda: ends.agent_end)
        assert ends.agent_end == "closed by the other end (1000 over)"


@combinations
async def test_a_close_tells_its_code_and_reason(core_tapped: bool, agent_tapped: bool) -> None:
    async with transports(core_tapped, agent_tapped) as ends:
        await ends.core.send(b"last")
        await ends.core.close("the core is shutting down")
        await ends.until(lambda: ends.agent_end)
        assert ends.to_agent == [b"last"]
        assert ends.agent_end == "closed by the other end (1000 the core is shutting down)"


@pytest.mark.parametrize("pings", [1, 50], ids=["one by one", "many at once"])
async def test_pings_that_cross_our_close_break_nothing(pings: int) -> None:
    """trio-websocket raises for a ping that it comes to when it has said its close; that must not take the place of a
    stranger's refusal."""
    async with transports(True, False) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(ends.core.close, "refused")
        for _ in range(20):
            try:
                await Raw(ends).send(_frame(PING, b"still there?") * pings)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
            await trio.lowlevel.checkpoint()


@tapped
async def test_nothing_is_heard_behind_a_close(core_tapped: bool) -> None:
    async with transports(core_tapped, False) as ends:
        await Raw(ends).send(_frame(CLOSE, b"\x03\xe8bye") + _frame(FIN | BINARY, b"behind"))
        await ends.until(lambda: ends.core_end)
        assert ends.core_end == "closed by the other end (1000 bye)"
        assert ends.to_core == []


@combinations
async def test_a_lost_connection_ends_the_delivery(core_tapped: bool, agent_tapped: bool) -> None:
    async with transports(core_tapped, agent_tapped) as ends:
        ends.agent.socket.abort()
        await ends.until(lambda: ends.core_end)
        assert ends.core_end == "the connection was lost"
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await ends.core.send(b"x")


@tapped
@pytest.mark.parametrize("size", [2, 180_000])
async def test_an_end_right_behind_a_message_is_seen(core_tapped: bool, size: int) -> None:
    """Both are told of at once, or the end while the message is read: it is not told of again."""
    async with transports(core_tapped, False) as ends:
        await wait_all_tasks_blocked(0.01)
        socket = ends.agent.socket
        socket.sock.setsockopt(1, 7, 500_000)  # SO_SNDBUF: all of it leaves at once
        frame = _frame(FIN | BINARY, bytes(size))
        assert socket.send_nowait(frame) == len(frame)
        socket.shutdown()
        await ends.until(lambda: ends.core_end)
        assert (ends.to_core, ends.core_end) == ([bytes(size)], "the connection was lost")


@tapped
async def test_a_text_message_breaks_the_protocol(core_tapped: bool) -> None:
    async with transports(core_tapped, False) as ends:
        await Raw(ends).send(_frame(FIN | BINARY, b"x") + _frame(FIN | TEXT, b"hello"))
        await ends.until(lambda: ends.core_end)
        assert ends.to_core == [b"x"]
        assert ends.core_end == "WireError: a text message came"


WRONG = {
    "unmasked from the client": (_frame(FIN | BINARY, b"x", key=b""), 1002),
    "reserved bit": (_frame(FIN | 0x40 | BINARY, b"x"), 1002),
    "reserved opcode": (_frame(FIN | 0x03, b"x"), 1002),
    "continuation of nothing": (_frame(FIN | CONTINUED, b"x"), 1002),
    "fragmented ping": (_frame(0x09, b"x"), 1002),
    "long ping": (_frame(PING, bytes(126)), 1002),
    "endless ping": (_frame(PING, b"", size=2**62), 1002),
    "too long": (_frame(FIN | BINARY, bytes(MAX_MESSAGE + 1)), 1009),
    "too long in fragments": (
        _frame(BINARY, bytes(MAX_MESSAGE)) + _frame(FIN | CONTINUED, bytes(MAX_MESSAGE // 2)),
        1009,
    ),
}


@tapped
@pytest.mark.parametrize("name", WRONG)
async def test_what_is_wrong_is_closed_with_a_code_and_nothing_behind_it_is_heard(core_tapped: bool, name: str) -> None:
    data, code = WRONG[name]
    async with transports(core_tapped, False) as ends:

        async def send() -> None:
            try:
                await Raw(ends).send(data + _frame(FIN | BINARY, b"behind"))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # closed while we were still talking

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await ends.until(lambda: ends.core_end)
            nursery.cancel_scope.cancel()
        assert ends.core_end.startswith(f"WireError: its WebSocket frames are wrong ({code}")
        assert ends.to_core == []


@pytest.mark.parametrize("agent_tapped", [False, True], ids=["plain", "tapped"])
async def test_a_masked_server_frame_is_closed(agent_tapped: bool) -> None:
    async with transports(False, agent_tapped) as ends:
        await ends.core.socket.send(_frame(FIN | BINARY, b"x"))
        await ends.until(lambda: ends.agent_end)
        assert ends.to_agent == []


# Senders that are cancelled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core_tapped", [False, True], ids=["plain", "tapped"])
async def test_a_sender_cancelled_within_a_frame_lets_nothing_follow(core_tapped: bool) -> None:
    near, far = socket_pair()
    async with trio.open_nursery() as nursery:
        made: list[transport.Transport] = []

        async def accept() -> None:
            made.append(await transport.accept(nursery, near, lambda message: None, core_tapped))

        async with trio.open_nursery() as shaking:
            shaking.start_soon(accept)
            await far.send(
                b"GET /link HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            head = b""
            while b"\r\n\r\n" not in head:
                head += await far.recv()
        (core,) = made
        full = trio.Event()

        async def clog() -> None:
            while True:  # until the kernel takes no more: then it is somewhere within a frame
                await core.send(bytes(MAX_MESSAGE))

        with trio.CancelScope() as scope:
            nursery.start_soon(_watch, near, full)
            async with trio.open_nursery() as sending:
                sending.start_soon(clog)
                await full.wait()
                await trio.testing.wait_all_tasks_blocked(0.05)
                scope.cancel()
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await core.send(b"after")
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError, trio_websocket.ConnectionClosed)):
            await core._ws.ping(b"after")
        got = head.partition(b"\r\n\r\n")[2]
        try:
            while part := await far.recv():
                got += part
        except trio.BrokenResourceError:
            pass
        whole, rest = divmod(len(got), MAX_MESSAGE + 10)
        assert rest, "the frame was not cut off: the test did not test"
        assert got == (_frame(FIN | BINARY, bytes(MAX_MESSAGE), key=b"") * (whole + 1))[: len(got)]
        nursery.cancel_scope.cancel()
    near.close()
    far.close()


async def _watch(socket: Socket, full: trio.Event) -> None:
    """Set when the kernel's buffer is full."""
    poll = select.poll()
    poll.register(socket.sock, select.POLLOUT)
    while poll.poll(0):
        await trio.lowlevel.checkpoint()
    full.set()


# The handshake --------------------------------------------------------------------------------------------------------


async def _shake(path: str) -> tuple[bytes, list[BaseException]]:
    near, far = socket_pair()
    problems: list[BaseException] = []
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            try:
                await transport.accept(nursery, near, lambda message: None)
            except Exception as exc:
                problems.append(exc)

        nursery.start_soon(accept)
        await far.send(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n".encode()
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = await far.recv()
            assert part
            answer += part
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    near.close()
    far.close()
    return answer, problems


async def test_the_path_without_extensions() -> None:
    answer, problems = await _shake("/link?x=1")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-extensions" not in answer.lower()
    assert not problems


async def test_another_path_is_refused() -> None:
    answer, problems = await _shake("/")
    assert answer.startswith(b"HTTP/1.1 404 ")
    (problem,) = problems
    assert isinstance(problem, WireError)


@pytest.mark.parametrize("path", ["/link", "/"])
async def test_who_leaves_within_the_handshake(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the request and our answer to it: that is a broken connection like any other."""
    near, far = socket_pair()
    for name in ("accept", "reject"):
        plain = getattr(trio_websocket.WebSocketRequest, name)

        async def late(*args: object, plain: object = plain, **more: object) -> object:
            far.abort()
            await trio.testing.wait_all_tasks_blocked()
            return await plain(*args, **more)  # type: ignore[operator]

        monkeypatch.setattr(trio_websocket.WebSocketRequest, name, late)
    async with trio.open_nursery() as nursery:
        await far.send(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        with pytest.raises(trio.BrokenResourceError, match="during the WebSocket handshake"):
            await transport.accept(nursery, near, lambda message: None)
        nursery.cancel_scope.cancel()
    near.close()


@pytest.mark.parametrize("core_side", [False, True])
async def test_what_is_sent_without_waiting_arrives_whole_and_in_order(core_side: bool) -> None:
    """Far more than the kernel takes at once: the rest leaves before whatever comes next, be it a pong."""
    async with transports(True, True, None) as ends, trio.open_nursery() as nursery:
        one, got = (ends.core, ends.to_agent) if core_side else (ends.agent, ends.to_core)
        other = ends.agent if core_side else ends.core
        one.socket.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        messages = [bytes([number]) * 200_000 for number in range(6)]
        one.send_now(messages[0])
        assert one.has_rest and not one.can_send_now
        nursery.start_soon(other.ping)
        nursery.start_soon(one.send, messages[1])
        await ends.until(lambda: len(got) == 2)
        for message in messages[2:]:
            while not one.can_send_now:
                await one.send_rest()
            one.send_now(message)
        await one.send_rest()
        await ends.until(lambda: len(got) == 6)
        assert got == messages
        assert not one.has_rest


async def test_the_plain_way_never_sends_without_waiting() -> None:
    async with transports(False, False, None) as ends:
        assert not ends.core.can_send_now and not ends.core.has_rest


async def test_masking_keys_are_used_once() -> None:
    one, other = socket_pair()
    tap = Tap(one, client=True)
    keys = {tap._frame(b"")[2:6] for _ in range(10 * MASKS)}
    assert len(keys) == 10 * MASKS
    one.close()
    other.close()
