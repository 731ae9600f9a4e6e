"""The control exchange: JSON there and back, unknown keys ignored, hostile bytes refused, the token never shown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.errors import WireError
from tunnel.wire import control
from tunnel.wire.control import Hello, RefusedMessage, TunnelGrant, TunnelRequest, Welcome
from tunnel.wire.frames import MAX_TEXT

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
hellos = st.builds(
    Hello, st.lists(st.integers(0, 99)), words, words, words, st.lists(st.builds(TunnelRequest, words, words, words))
)
welcomes = st.builds(
    Welcome, st.integers(0, 9), words, words, words, words, st.lists(st.builds(TunnelGrant, words, words, words))
)
refusals = st.builds(RefusedMessage, words, words, st.floats(0, 1e6))


@given(hellos | welcomes | refusals)
def test_there_and_back(message: Hello | Welcome | RefusedMessage) -> None:
    kind: Any = type(message)
    assert control.decode(kind, control.encode(message)) == message


def test_what_may_be_missing_and_what_is_unknown() -> None:
    text = b'{"versions":[1],"agent_version":"9","agent_id":"a","token":"t","tunnels":[{"name":"x","new":1}],"new":{}}'
    hello = control.decode(Hello, text)
    assert (hello.instance, hello.max_streams, hello.capabilities) == ("", 1000, [])
    assert hello.tunnels == [TunnelRequest("x", "http", "")]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"new":' + b"[" * 50_000,
        b'{"new":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b"",
        b"{}",
        b"null",
        b"[]",
        b"\xff",
        b'{"reason":1,"text":""}',
        b"[" * 50_000,
        b'{"reason":"\xff","text":""}',
    ],
)
@pytest.mark.parametrize("kind", [Hello, Welcome, RefusedMessage])
def test_what_is_not_such_a_message_is_refused_without_quoting_it(kind: type, payload: bytes) -> None:
    with pytest.raises(WireError, match=f"a {kind.__name__} message could not be read"):
        control.decode(kind, payload)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        control.decode(Hello, payload)


def test_the_token_is_not_in_the_repr() -> None:
    hello = Hello([1], "1", "a", "tt_secret", [])
    assert "tt_secret" not in repr(hello)
    assert "tt_secret" not in f"{hello}"


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_ping_and_pong(token: int, sent: int, answered: int) -> None:
    assert control.unpack_pong(control.pack_pong(control.pack_ping(token, sent), answered)) == (token, sent, answered)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_pings_of_the_wrong_size(size: int) -> None:
    with pytest.raises(WireError):
        control.pack_pong(bytes(size), 0)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_pongs_of_the_wrong_size(size: int) -> None:
    with pytest.raises(WireError):
        control.unpack_pong(bytes(size))


def test_a_long_farewell_is_cut() -> None:
    assert control.pack_goaway("é" * 5000)[:MAX_TEXT] == ("é" * (MAX_TEXT // 2)).encode()
