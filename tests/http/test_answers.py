"""Every row of the outcome table in every format, read back by an independent h11 client."""

import json
import re
from html.parser import HTMLParser

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnel.errors import OUTCOMES, Outcome
from tunnel.http.answers import _preferred, answer, preferred

ACCEPTS = {"html": b"text/html,application/xhtml+xml,*/*;q=0.8", "json": b"application/json", "text": b"*/*"}
HOSTILE = "<script>alert('x')</script>\"&\r\nSet-Cookie: a=b\x00\u202e\ud800"
VOID = {"meta"}


class Read:
    """An answer as an h11 client sees it."""

    def __init__(self, raw: bytes, method: str = "GET") -> None:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(raw)
        head = client.next_event()
        assert isinstance(head, h11.Response)
        self.status, self.reason = head.status_code, head.reason
        self.fields = {name.decode(): value.decode() for name, value in head.headers}
        assert len(self.fields) == len(list(head.headers))
        self.body = b""
        while isinstance(event := client.next_event(), h11.Data):
            self.body += event.data
        assert isinstance(event, h11.EndOfMessage)
        assert client.trailing_data[0] == b""


class Page(HTMLParser):
    """Collects text and checks that tags are closed in order."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(body.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


answered = [row for row in OUTCOMES.values() if row.status != 499]


@pytest.mark.parametrize("form", ACCEPTS)
@pytest.mark.parametrize("row", answered, ids=lambda row: row.name)
def test_every_outcome_in_every_format(row: Outcome, form: str) -> None:
    status, head, body = answer(
        row.name, request_id="r-1", accept=ACCEPTS[form], host="api.example.com", detail="it was so", retry_after=6.2
    )
    read = Read(head + body)
    assert status == read.status == row.status
    assert read.body == body
    assert read.fields["x-tunnel-outcome"] == row.name
    assert read.fields["x-request-id"] == "r-1"
    assert read.fields["cache-control"] == "no-store"
    assert read.fields["x-content-type-options"] == "nosniff"
    assert int(read.fields["content-length"]) == len(body)
    assert "connection" not in read.fields
    assert read.fields.get("retry-after") == ("7" if row.status in (429, 503) else None)
    assert ("allow" in read.fields) == (row.status == 405)
    said = {row.title, row.advice, "it was so", "api.example.com", "r-1", row.name}
    if form == "json":
        assert read.fields["content-type"] == "application/json"
        facts = json.loads(body)
        assert said <= set(facts.values())
        assert (facts["outcome"], facts["status"], facts["side"]) == (row.name, row.status, row.side)
    elif form == "html":
        assert read.fields["content-type"] == "text/html; charset=utf-8"
        page = Page(body)
        assert all(text in page.text for text in said)
        assert page.text.count("it broke here") == (row.side != "nobody" and not row.blames)
        assert not re.search(rb"https?://|src=|href=", body)
        assert len(body) < 4096
    else:
        assert read.fields["content-type"] == "text/plain; charset=utf-8"
        assert all(text in body.decode() for text in said)
        assert f"Side: {row.side} " in body.decode() or row.side == "nobody"
        assert body.startswith(b"%d " % row.status)
        assert body.endswith(b"\n")


@pytest.mark.parametrize("form", ACCEPTS)
def test_a_visitor_is_not_blamed_for_what_an_account_has_used(form: str) -> None:
    _, head, body = answer("quota", request_id="r", accept=ACCEPTS[form], retry_after=37 * 3600)
    read = Read(head + body)
    page = Page(body).text if form == "html" else body.decode()
    assert read.fields["retry-after"] == str(37 * 3600)
    assert "The account that this tunnel belongs to has reached its limit." in page
    assert "Nothing is wrong with this request." in page and "owner" in page
    assert "the request itself" not in page and "it broke here" not in page and "Wait and try again" not in page


def test_nothing_is_written_for_a_visitor_who_has_left() -> None:
    assert answer("visitor_aborted", request_id="r") == (499, b"", b"")


def test_an_unknown_outcome_raises() -> None:
    with pytest.raises(KeyError):
        answer("odd", request_id="r")


@pytest.mark.parametrize("form", ACCEPTS)
def test_hostile_values_stay_text(form: str) -> None:
    _, head, body = answer("no_tunnel", request_id=HOSTILE, accept=ACCEPTS[form], host=HOSTILE, detail=HOSTILE)
    read = Read(head + body)
    assert "set-cookie" not in read.fields
    assert read.fields["x-request-id"] == "<script>alert('x')</script>\"&Set-Cookie:a=b"
    if form == "html":
        page = Page(body)
        assert "script" not in page.tags
        assert page.text.count("<script>alert('x')</script>\"&") == 3
    elif form == "json":
        assert json.loads(body)["host"].startswith("<script>alert('x')</script>\"&  Set-Cookie: a=b ")
    else:
        assert b"\nSet-Cookie" not in body
        assert b"\x00" not in body


@given(st.text(), st.text(), st.text(), st.sampled_from(sorted(ACCEPTS)), st.floats())
def test_any_values_give_a_valid_answer(host: str, detail: str, request_id: str, form: str, wait: float) -> None:
    _, head, body = answer(
        "quota", request_id=request_id, accept=ACCEPTS[form], host=host, detail=detail, retry_after=wait
    )
    read = Read(head + body)
    assert 1 <= int(read.fields["retry-after"]) <= 31 * 86400
    assert len(body) < 6000 + 6 * 800
    if form == "html":
        Page(body)
    elif form == "json":
        json.loads(body)


@pytest.mark.parametrize("form", ACCEPTS)
def test_head_has_the_same_fields_and_no_body(form: str) -> None:
    _, head, body = answer("timeout", request_id="r", accept=ACCEPTS[form])
    _, bare, nothing = answer("timeout", request_id="r", accept=ACCEPTS[form], method="HEAD")
    assert nothing == b""
    assert Read(bare, "HEAD").fields["content-length"] == str(len(body)) == Read(head + body).fields["content-length"]


@pytest.mark.parametrize(
    ("version", "close", "said"), [("1.1", False, False), ("1.1", True, True), ("1.0", False, True)]
)
def test_close_is_said(version: str, close: bool, said: bool) -> None:
    _, head, body = answer("bad_request", request_id="r", http_version=version, close=close)
    assert (Read(head + body).fields.get("connection") == "close") is said


def test_retry_after_is_at_least_a_second() -> None:
    for wait, seconds in ((0, "1"), (0.2, "1"), (1.01, "2"), (float("inf"), str(31 * 86400)), (float("nan"), "1")):
        _, head, body = answer("draining", request_id="r", retry_after=wait)
        assert Read(head + body).fields["retry-after"] == seconds


def test_another_status_than_the_tables() -> None:
    status, head, body = answer("bad_request", request_id="r", status=426)
    assert status == Read(head + body).status == 426
    assert body.startswith(b"426 bad_request")
    _, head, _ = answer("internal", request_id="r", status=599)
    assert head.startswith(b"HTTP/1.1 599 \r\n")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (b"", "text"),
        (b"*/*", "text"),
        (b"image/png", "text"),
        (b"text/html", "html"),
        (b"TEXT/HTML;level=1", "html"),
        (b"application/json, text/plain, */*", "json"),
        (b"text/html;q=0.5, application/json", "json"),
        (b"application/json;q=0.5, text/html;q=0.6", "html"),
        (b"text/html;q=0, */*", "text"),
        (b"text/html;q=x", "text"),
        (b"text/html;q=7", "text"),
        (b"text/html ; q=0.1", "html"),
        (b"text/html;q=nan", "text"),
        (b"text/plain, text/html", "text"),
        (b"\xff/\xfe, application/json", "json"),
    ],
)
def test_accept(accept: bytes, form: str) -> None:
    assert preferred(accept) == form


@given(st.binary(max_size=2000))
def test_any_accept_gives_one_of_three(accept: bytes) -> None:
    assert _preferred(accept) in ACCEPTS


def test_caches_are_bounded_against_hostile_accepts() -> None:
    before = preferred.cache_info().currsize
    answer("no_tunnel", request_id="r", accept=b"text/html;" + b"x" * 5000)
    assert preferred.cache_info().currsize == before
    assert preferred.cache_info().maxsize == 256
