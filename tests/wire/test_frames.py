"""Frames there and back, and everything about them that must be refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.errors import WireError
from tunnel.wire import frames
from tunnel.wire.frames import Open, Response

opens = st.builds(
    Open,
    st.integers(0, 3),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(-2, 2**63 - 1),
    st.binary(max_size=200),
    st.binary(max_size=200),
)
responses = st.builds(
    Response,
    st.integers(100, 999),
    st.integers(-2, 2**63 - 1),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=200),
)
one_frame = st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 0xFFFFFFFF), st.binary(max_size=100))


@given(st.lists(one_frame, max_size=20))
def test_many_frames_in_a_message_come_out_as_they_went_in(parts: list[tuple[int, int, int, bytes]]) -> None:
    message = b"".join(frames.frame(kind, stream, payload, flags) for kind, flags, stream, payload in parts)
    assert list(frames.split(message)) == parts


@given(st.lists(one_frame, min_size=1, max_size=5), st.data())
def test_a_message_that_ends_within_a_frame_is_refused(
    parts: list[tuple[int, int, int, bytes]], data: st.DataObject
) -> None:
    whole = [frames.frame(kind, stream, payload, flags) for kind, flags, stream, payload in parts]
    message = b"".join(whole)
    ends = {0}
    for part in whole:
        ends.add(max(ends) + len(part))
    cut = data.draw(st.integers(0, len(message)).filter(lambda at: at not in ends))
    with pytest.raises(WireError):
        list(frames.split(message[:cut]))


def test_a_payload_may_be_as_long_as_the_limit_and_no_longer() -> None:
    ((_, _, _, payload),) = frames.split(frames.frame(99, 0, b"x" * frames.MAX_PAYLOAD))
    assert len(payload) == frames.MAX_PAYLOAD
    with pytest.raises(WireError):
        list(frames.split(frames.frame(99, 0, b"x" * (frames.MAX_PAYLOAD + 1))))


@given(opens, st.binary(max_size=100))
def test_open_there_and_back(opened: Open, body: bytes) -> None:
    assert frames.unpack_open(frames.pack_open(opened, body)) == (opened, body)


@given(responses, st.binary(max_size=100))
def test_response_there_and_back(response: Response, body: bytes) -> None:
    assert frames.unpack_response(frames.pack_response(response, body)) == (response, body)


def test_an_exchange_of_hours_has_the_longest_time_that_fits() -> None:
    there, _ = frames.unpack_response(frames.pack_response(Response(200, 0, 72 * 60 * 10**6, 2**32, b"OK\r\n")))
    assert (there.agent_us, there.local_us) == (2**32 - 1, 2**32 - 1)


@given(st.binary(max_size=120))
def test_random_payloads_give_a_frame_or_a_wire_error(payload: bytes) -> None:
    for unpack in (frames.unpack_open, frames.unpack_response):
        try:
            found, body = unpack(payload)
        except WireError:
            continue
        assert payload.endswith(found.head + body)


def _open(**changes: int) -> bytes:
    values = {"protocol": 0, "tunnel": 0, "deadline": 0, "length": 0, "context": 0, "head": 0, **changes}
    return frames.OPEN_HEAD.pack(*values.values())


def _response(**changes: int) -> bytes:
    values = {"status": 200, "length": 0, "agent": 0, "local": 0, "head": 0, **changes}
    return frames.RESPONSE_HEAD.pack(*values.values())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        _open()[:-1],
        _open(protocol=4),
        _open(length=-3),
        _open(context=1),
        _open(head=1),
        _open(context=2, head=0xFFFFFFFF) + b"xx",
        _open(head=frames.MAX_HEAD + 1) + bytes(frames.MAX_HEAD + 1),
        _open(context=frames.MAX_CONTEXT + 1) + bytes(frames.MAX_CONTEXT + 1),
    ],
)
def test_bad_opens(payload: bytes) -> None:
    assert frames.unpack_open(_open())[1] == b""
    with pytest.raises(WireError):
        frames.unpack_open(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        _response()[:-1],
        _response(status=99),
        _response(status=1000),
        _response(length=-3),
        _response(head=1),
        _response(head=frames.MAX_HEAD + 1) + bytes(frames.MAX_HEAD + 1),
    ],
)
def test_bad_responses(payload: bytes) -> None:
    assert frames.unpack_response(_response())[1] == b""
    with pytest.raises(WireError):
        frames.unpack_response(payload)


def test_which_statuses_are_interim() -> None:
    assert [status for status in range(100, 600) if frames.is_interim(status)] == [100, *range(102, 200)]
