"""A local service's bytes, read to the end of one exchange by us and by h11."""

from __future__ import annotations

from dataclasses import dataclass

import h11

from tunnel.errors import Failure
from tunnel.http.chunks import Chunks
from tunnel.http.heads import check_trailers
from tunnel.http.response import _OWN, MAX_HEAD, find_head, has_no_body, parse_answer
from tunnel.wire.frames import UNKNOWN

Facts = tuple[int, list[tuple[bytes, bytes]], bytes, bytes]


@dataclass
class Answered:
    """The final answer. whole: its body came to its end, and that end is no end of the connection."""

    status: int
    head: bytes
    body: bytes = b""
    trailers: bytes = b""
    whole: bool = False

    def facts(self) -> Facts:
        lines = [line.partition(b": ") for line in self.head.split(b"\r\n")[1:-1]]
        fields = [(name.lower(), b" ".join(value.split())) for name, _, value in lines if name.lower() != b"upgrade"]
        return self.status, fields, self.body, self.trailers


def we_read(raw: bytes, method: bytes, step: int) -> Answered | None:
    """The bytes come `step` at a time. None: refused, or not whole."""
    parts = [raw[at : at + step] for at in range(0, len(raw), max(step, 1))]
    data = b""
    try:
        while True:
            end = find_head(data) if data else 0
            if end:
                answer = parse_answer(data, end, method)
                data = answer.rest
                if answer.status >= 200 or answer.status == 101:
                    break
            elif parts:
                data += parts.pop(0)
            else:
                return None
        made = Answered(answer.status, answer.head)
        if answer.chunked:
            chunks = Chunks()
            for part in [data, *parts]:
                made.body += b"".join(chunks.feed(part))
                assert not chunks.is_behind
            made.whole, made.trailers = chunks.ended, chunks.trailers
            return made
    except Failure as exc:
        assert exc.outcome == "local_broken"
        return None
    rest = data + b"".join(parts)
    size = 0 if has_no_body(method, answer.status) else max(answer.length, 0)
    made.body, made.whole = rest[:size], answer.length != UNKNOWN and len(rest) >= size
    return made


def h11_reads(raw: bytes, method: bytes) -> Facts | None:
    """What h11's client makes of it, without the fields that are not passed on. None: refused, or not whole."""
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=4 * MAX_HEAD)
    upgrade = [(b"Connection", b"Upgrade"), (b"Upgrade", b"x")]
    reader.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"a"), *upgrade]))
    reader.send(h11.EndOfMessage())
    try:
        reader.receive_data(raw)
        head = reader.next_event()
        while isinstance(head, h11.InformationalResponse) and head.status_code != 101:
            head = reader.next_event()
        if not isinstance(head, h11.Response | h11.InformationalResponse):
            return None
        named = {
            word.strip().lower() for name, value in head.headers if name == b"connection" for word in value.split(b",")
        }
        dropped = _OWN | named
        fields = [(name, b" ".join(value.split())) for name, value in head.headers if name not in dropped]
        if head.status_code == 101:
            return 101, fields, b"", b""
        body = b""
        while isinstance(event := reader.next_event(), h11.Data):
            body += event.data
        if not isinstance(event, h11.EndOfMessage):
            return None
        lines = [name + b": " + value + b"\r\n" for name, value in event.headers.raw_items()]
        return head.status_code, fields, body, b"".join(line for line in lines if check_trailers(line))
    except h11.RemoteProtocolError:
        return None
