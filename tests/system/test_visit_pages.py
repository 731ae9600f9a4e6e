"""The core's own answers as visitors see them."""

import json
import re

import pytest
from pair import Tunnel

pytestmark = pytest.mark.system

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [(BROWSER, "text/html; charset=utf-8"), ("application/json", "application/json"),
     ("*/*", "text/plain; charset=utf-8"), ("", "text/plain; charset=utf-8"),
     ("application/json, text/html;q=0.5", "application/json")],
)  # fmt: skip
def test_each_reader_gets_its_format(tunnel: Tunnel, accept: str, content_type: str) -> None:
    with tunnel.connect() as visitor:
        fields = [f"Accept: {accept}"] if accept else []
        answer = visitor.ask("GET /secret?key=1", "Host: nobody.localhost", "X-Request-Id: page-1", *fields)
        assert visitor.ask("GET /echo").status == 200  # such an answer does not end the connection
    text = answer.body.decode()
    assert (answer.status, answer["content-type"], answer.outcome) == (404, content_type, "no_tunnel")
    assert answer["x-request-id"] == "page-1" and answer["cache-control"] == "no-store"
    for word in ("no_tunnel", "nobody.localhost", "page-1", "visitor", "There is no tunnel with this name."):
        assert word.lower() in text.lower(), (word, text)
    assert "secret" not in text
    if content_type == "application/json":
        facts = json.loads(text)
        assert (facts["outcome"], facts["status"], facts["side"], facts["request_id"]) == (
            "no_tunnel",
            404,
            "visitor",
            "page-1",
        )
    if content_type.startswith("text/html"):
        assert text.startswith("<!doctype html>") and "default-src 'none'" in answer["content-security-policy"]


def test_pages_escape_what_visitors_send(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("GET /<script>", "Host: <script>.localhost", "Accept: text/html")
        assert answer.status == 400 and b"<script>" not in answer.body


def test_head_gets_no_page(tunnel: Tunnel) -> None:
    with tunnel.connect() as visitor:
        answer = visitor.ask("HEAD /", "Host: nobody.localhost")
        assert (answer.status, int(answer["content-length"]) > 0) == (404, True)
        assert visitor.ask("GET /echo").status == 200


def test_a_failed_request_with_a_body_keeps_the_answers_in_step(tunnel: Tunnel) -> None:
    """What is left of its body is never taken for the next request."""
    with tunnel.connect() as visitor:
        visitor.send(
            visitor.request("POST /", "Host: nobody.localhost", body=b"GET /x HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        )
        assert visitor.read().status == 404
        try:
            answer = visitor.ask("GET /echo")
        except OSError:
            return  # it may close instead
        assert (answer.status, answer.body) == (200, b"")


def test_the_outcome_is_ours_alone(tunnel: Tunnel) -> None:
    """On the core's own answers only: a service's 502 has none, so that nobody has to guess whose fault it was."""
    with tunnel.connect() as visitor:
        assert visitor.ask("GET /status/502").outcome == ""
        assert visitor.ask("GET /nothing").outcome == "local_broken"
        assert visitor.ask("GET /headers").outcome == ""


def test_ids_join_answer_service_and_log(tunnel: Tunnel) -> None:
    seen = tunnel.core.mark()
    with tunnel.connect() as visitor:
        made = visitor.ask("GET /head")
        name = made["x-request-id"]
        assert re.fullmatch(r"[\x21-\x7e]{8,128}", name)
        assert tunnel.service.wait_request("/head").get("x-request-id") == name
        tunnel.core.wait_for("request", after=seen, request_id=name, outcome="ok")
        failed = visitor.ask("GET /nothing")["x-request-id"]
        record = tunnel.core.wait_for("request", after=seen, request_id=failed, outcome="local_broken")
        assert record["level"] == "ERROR" and record["status"] == 502
