"""Facts of spans straight into OTLP's protobuf bytes, for the default exporter.

The SDK's encoder makes a message object of every attribute: 68 µs a span, against less than 10 µs here. With everything
traced that is the difference between a tenth and a half of a core's time. A test holds these bytes against the SDK's
own encoding of the same spans. Sending (headers, TLS, compression, trying again) stays the SDK's.

Source: opentelemetry/proto/trace/v1/trace.proto, common/v1/common.proto; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

from observability.spans import Attributes, Facts

_fixed64 = Struct("<Q").pack
_double = Struct("<d").pack
_times = Struct("<BQBQ").pack  # fields 7 and 8 of a span: start and end

#: SpanFlags: "is remote is known" and "the parent is remote"
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200
_FLAGS = {
    is_remote: b"\x85\x01" + Struct("<I").pack(_HAS_IS_REMOTE | (_IS_REMOTE if is_remote else 0))
    for is_remote in (False, True)
}
_ERROR = b"\x18\x02"  # Status.code = STATUS_CODE_ERROR
_EMPTY_STATUS = b"\x7a\x00"
_KINDS = {kind: bytes((0x30, kind)) for kind in range(6)}


def varint(number: int) -> bytes:
    """Protobuf's variable-length integer, not negative."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_VARINTS = tuple(varint(number) for number in range(4096))


def _size(number: int) -> bytes:
    return _VARINTS[number] if number < 4096 else varint(number)


def _field(tag: bytes, payload: bytes) -> bytes:
    return tag + _size(len(payload)) + payload


@lru_cache(1024)
def _before_value(tag: bytes, key: str, wire: bytes, size: int) -> bytes:
    """All of a KeyValue, as a field with this tag, that precedes the last `size` bytes: its lengths depend on them."""
    any_value = len(wire) + size
    name = _field(b"\x0a", key.encode())
    return tag + _size(len(name) + 1 + len(_size(any_value)) + any_value) + name + b"\x12" + _size(any_value) + wire


@lru_cache(1024)
def _before_double(tag: bytes, key: str) -> bytes:
    return _before_value(tag, key, b"\x21", 8)


@lru_cache(8192)
def _before_text(tag: bytes, key: str, size: int) -> bytes:
    return _before_value(tag, key, b"\x0a" + _size(size), size)


@lru_cache(1024)
def _before_time(event: str) -> bytes:
    """An event without an attribute, as a field of a span, up to its time."""
    name = _field(b"\x12", event.encode())
    return b"\x5a" + _size(len(name) + 9) + name + b"\x09"


@lru_cache(1024)
def _name(name: str, kind: int) -> bytes:
    return _field(b"\x2a", name.encode()) + _KINDS[kind]


def _attributes(out: list[bytes], tag: bytes, attributes: Attributes) -> None:
    """Append each as a KeyValue, a field with this tag, in pieces."""
    for key, value in attributes.items():
        if type(value) is float:
            out.append(_before_double(tag, key) + _double(value))
        elif isinstance(value, str):
            text = value.encode()
            out.append(_before_text(tag, key, len(text)) + text)
        else:
            number = _VARINTS[value] if 0 <= value < 4096 else varint(value & 0xFFFFFFFFFFFFFFFF)
            out.append(_before_value(tag, key, b"\x18", len(number)) + number)


class Encoder:
    """head: a serialised ResourceSpans message without its scope_spans. scope_head: a ScopeSpans one without spans."""

    def __init__(self, resource_head: bytes, scope_head: bytes) -> None:
        self._resource_head = resource_head
        self._scope_head = scope_head

    def request(self, spans: Sequence[bytes]) -> bytes:
        """An ExportTraceServiceRequest of encoded spans."""
        scope = self._scope_head + b"".join(spans)
        return _field(b"\x0a", self._resource_head + _field(b"\x12", scope))

    def span(self, facts: Facts) -> bytes:
        """A span as a field of ScopeSpans."""
        unhex = bytes.fromhex
        parts = [
            b"\x0a\x10",
            unhex(facts.trace_id),
            b"\x12\x08",
            unhex(facts.span_id),
            _name(facts.name, facts.kind),
            _times(0x39, facts.start, 0x41, facts.end),
            _FLAGS[facts.is_remote],
        ]
        if facts.tracestate:
            parts.append(_field(b"\x1a", facts.tracestate.encode()))
        if facts.parent_id:
            parts += (b"\x22\x08", unhex(facts.parent_id))
        for common in facts.common:
            encoded = common.encoded
            if not encoded and common.attributes:
                pieces: list[bytes] = []
                _attributes(pieces, b"\x4a", common.attributes)
                encoded = common.encoded = b"".join(pieces)
            parts.append(encoded)
        _attributes(parts, b"\x4a", facts.own)
        for event, at, what in facts.events:
            if what:
                pieces = [_field(b"\x12", event.encode()), b"\x09", _fixed64(at)]
                _attributes(pieces, b"\x1a", {"exception.type": what})
                parts.append(_field(b"\x5a", b"".join(pieces)))
            else:
                parts.append(_before_time(event) + _fixed64(at))
        if facts.link is not None:
            pieces = [b"\x0a\x10", unhex(facts.link.trace_id), b"\x12\x08", unhex(facts.link.span_id)]
            _attributes(pieces, b"\x22", {"tunnel.link": "visitor"})
            pieces.append(b"\x35" + _FLAGS[True][2:])
            parts.append(_field(b"\x6a", b"".join(pieces)))
        parts.append(_field(b"\x7a", _description(facts.description) + _ERROR) if facts.failed else _EMPTY_STATUS)
        return _field(b"\x12", b"".join(parts))


def _description(text: str) -> bytes:
    return _field(b"\x12", text.encode()) if text else b""
