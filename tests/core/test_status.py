"""The status page: what stands on it, that nothing on it does anything, and who gets it and who the JSON."""

from __future__ import annotations

import html.parser
import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest
from test_recent import HOSTILE, ended, noted

from tunnel.core.recent import FailedRequest, Recent
from tunnel.core.status import Said, TunnelStatus, status_page
from tunnel.core.statushtml import MAX_LINKS, MAX_ROWS, POLICY, lasting
from tunnel.handler import CoreStatistics, LinkStatistics, PageAnswer, PageRequest

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


class Source:
    """A core that says this."""

    def __init__(self, recent: Recent | None = None, **parts: Any) -> None:
        statistics = CoreStatistics(math.inf, 0, 0, parts.get("links", []), [], {}, limit_refusals={"handshakes": 0})
        checks = parts.get("checks", {"draining": {"ok": True, "reason": "serving"}})
        self._said = Said(statistics, checks, parts.get("tunnels", []), {}, recent or Recent())

    async def say(self) -> Said:
        return self._said

    async def ask(self, accept: str | None = None) -> PageAnswer:
        headers = {} if accept is None else {"accept": accept}
        return await status_page(self)(PageRequest("/", "", headers))

    async def html(self) -> str:
        return (await self.ask(BROWSER)).body.decode()


class Seen(html.parser.HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.names.add(name)
            (self.ids if name == "id" else self.hrefs if name == "href" else []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def link(connection_id: str = "conn-1", **facts: Any) -> LinkStatistics:
    known = {"agent_id": "laptop", "account_id": "acme", "state": "connected", **facts}
    numbers = dict.fromkeys(("streams", "frames_in", "frames_out", "frames_bad", "queue_bytes", "rtt", "offset"), 0)
    return LinkStatistics(connection_id, **{**numbers, **known})


@pytest.mark.parametrize(
    "accept", [None, "", "*/*", "application/json", "application/json, text/html;q=0.5", "text/plain"]
)
async def test_programs_get_json(accept: str | None) -> None:
    answer = await Source(noted(ended())).ask(accept)
    assert answer.content_type == "application/json" and answer.headers["Vary"] == "Accept"
    status = json.loads(answer.body)
    assert status.keys() >= {"version", "uptime_seconds", "checks", "connections", "links", "tunnels"}  # of old
    assert status["requests"] == {"total": 1, "failed": 1, "outcomes": {"local_refused": 1}}
    assert status["failures"][0]["request_id"] == "r" and status["limit_refusals"] == {}


async def test_browsers_get_a_page_that_may_load_nothing() -> None:
    answer = await Source(noted(ended())).ask(BROWSER)
    assert answer.content_type == "text/html; charset=utf-8"
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-store", "Accept")
    assert answer.headers["Content-Security-Policy"] == POLICY and "unsafe" not in POLICY
    text = answer.body.decode()
    style = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1 and f"'sha256-{b64encode(sha256(style[0].encode()).digest()).decode()}'" in POLICY
    page = Seen(text)
    assert not {"script", "img", "link", "iframe", "form"} & set(page.tags)
    assert not {"style", "src", "onload"} & page.names and "url(" not in style[0]


async def test_a_request_is_found_by_its_id() -> None:
    page = Seen(await Source(noted(ended(request_id="first"), ended("timeout", 504, request_id="a%b/c"))).html())
    assert page.ids.count("first") == 1 and page.ids.index("a%b/c") < page.ids.index("first")
    assert {"#first", "#a%25b%2Fc"} <= set(page.hrefs)
    assert "502 local_refused" in page.text and "whose side: local service" in page.text


async def test_ids_that_visitors_choose_stand_once_and_take_no_section() -> None:
    page = Seen(
        await Source(noted(ended(request_id="same"), ended(request_id="same"), ended(request_id="tunnels"))).html()
    )
    assert page.ids.count("same") == 1 and page.ids.count("tunnels") == 1
    assert page.ids.index("tunnels") < page.ids.index("same")  # it is the section's


async def test_whatever_others_have_chosen_is_text() -> None:
    recent = Recent(
        failures=[FailedRequest(0.0, *[HOSTILE] * 4, 502, *[HOSTILE] * 2, True, HOSTILE, 1.0, *[HOSTILE] * 5)]
    )
    probes = {HOSTILE: {"up": False, "outcome": HOSTILE, "reason": HOSTILE, "age_seconds": 1.0}}
    texts = dict.fromkeys(("agent_id", "account_id", "state", "instance", "remote"), HOSTILE)
    page = Seen(
        await Source(
            recent,
            links=[link(HOSTILE, **texts)],
            tunnels=[TunnelStatus(HOSTILE, HOSTILE, f"http://{HOSTILE}", HOSTILE, [HOSTILE], probes)],
            checks={HOSTILE: {"ok": False, "reason": HOSTILE}},
        ).html()
    )
    assert "script" not in page.tags and "onload" not in page.names
    assert page.text.count("<script>alert(1)</script>") > 10
    assert not re.search("[\x00\x1b\u202e\u2028]", page.text)


async def test_lists_and_texts_are_bounded() -> None:
    many = [link(f"conn-{at}", account_id="a" * 9000) for at in range(MAX_ROWS + 7)]
    names = [one.connection_id for one in many]
    tunnels = [TunnelStatus("n" * 9000, "http", "", "acme", names, {}) for _ in range(MAX_ROWS + 5)]
    text = await Source(links=many, tunnels=tunnels).html()
    page = Seen(text)
    assert "7 more links are in the JSON" in page.text and "5 more tunnels are in the JSON" in page.text
    assert f"and {len(many) - MAX_LINKS} more links" in page.text and len(text) < 1_000_000


async def test_what_is_served_and_by_whom() -> None:
    probes = {
        "conn-1": {"up": True, "outcome": "ok", "reason": "", "age_seconds": 3.0},
        "conn-2": {"up": False, "outcome": "local_refused", "reason": "nobody is there", "age_seconds": 4.0},
    }
    served = [
        TunnelStatus("app", "http", "https://app.example.com", "acme", ["conn-1", "conn-2", "conn-3"], probes),
        TunnelStatus("db", "tcp", "tcp://example.com:20000", "acme", [], {}),
    ]
    links = [
        link("conn-1", remote="192.0.2.9:4711", rtt=0.0123, streams=7, stalled_visitor=2),
        link("conn-2", agent_id="desktop", worker=1, state="draining"),
    ]
    page = Seen(await Source(links=links, tunnels=served).html())
    for said in (
        "local service is up", "local_refused: nobody is there", "not tried yet", "nobody now", "192.0.2.9:4711",
        "12.3 ms", "(2 stalled)", "draining", "desktop", "Worker", "not known yet",
    ):  # fmt: skip
        assert said in page.text, said
    assert "https://app.example.com" in page.hrefs and "tcp://example.com:20000" not in page.hrefs


async def test_how_requests_ended() -> None:
    recent = noted(ended(), ended("ok", 500, error="x"), ended("no_tunnel", 404))
    recent.outcomes["ok"] += 4
    text = Seen(await Source(recent).html()).text
    assert "ok 5, local_refused 1, no_tunnel 1 (1 of the ok ones are a local service's own 5xx)" in text
    assert re.search(r"Requests\s*7\s*Failed\s*2", text) and "Limits that were reached" not in text


async def test_a_limit_of_an_account_blames_no_single_visitor() -> None:
    text = Seen(await Source(noted(ended("quota", 429))).html()).text
    assert "whose side: visitor (all visitors" in text


async def test_a_core_that_is_new() -> None:
    text = Seen(await Source().html()).text
    assert "tunnel core: ✓ ready" in text and "Nothing is served" in text and "None since this core" in text


async def test_a_core_that_is_not_ready_says_why() -> None:
    text = Seen(await Source(checks={"store": {"ok": False, "reason": "it is away"}}).html()).text
    assert "tunnel core: ✗ not ready" in text and "✗ store: it is away" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (0.4, "0 s"), (59.9, "59 s"), (60, "1 min"), (185, "3 min 5 s"), (3600, "1 h"), (9600, "2 h 40 min"),
     (86400 * 3 + 4 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_how_long_it_lasts(seconds: float, text: str) -> None:
    assert lasting(seconds) == text
