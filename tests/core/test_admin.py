"""The status is for those who have its token, once others than this machine can reach it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tunnel.core.admin import FILE, MIN_TOKEN, OPEN, choose_token, guard
from tunnel.errors import ConfigError
from tunnel.handler import Page, PageAnswer, PageRequest

TOKEN = "a token of some length"


async def page(_: PageRequest) -> PageAnswer:
    return PageAnswer(200, b"secret things")


async def ask(pages: dict[str, Page], path: str, authorization: str | None = None) -> PageAnswer:
    headers = {} if authorization is None else {"authorization": authorization}
    return await pages[path](PageRequest(path, "", headers))


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("said", [f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic("", TOKEN), basic("any body", TOKEN)])
async def test_with_the_token(said: str) -> None:
    assert (await ask(guard({"/status": page}, TOKEN), "/status", said)).body == b"secret things"


@pytest.mark.parametrize(
    "said",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, basic(TOKEN, ""), "Basic %%",
     "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(), f"Digest {TOKEN}", "Bearer \udcff"],
)  # fmt: skip
async def test_without_it(said: str | None) -> None:
    answer = await ask(guard({"/status": page}, TOKEN), "/status", said)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert b"secret things" not in answer.body


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_probes_need_none(path: str) -> None:
    assert (await ask(guard({path: page}, TOKEN), path)).status == 200


async def test_no_token_no_lock() -> None:
    assert (await ask(guard({"/status": page}, None), "/status")).status == 200
    with pytest.raises(ValueError, match="no lock"):
        guard({"/status": page}, "")


def test_on_loopback_none_is_made(tmp_path: Path) -> None:
    for bound in ("127.0.0.1", "::1", "localhost"):
        assert choose_token("", bound, tmp_path) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_where_others_reach_it_one_is_made_and_kept(tmp_path: Path) -> None:
    token, path = choose_token("", "", tmp_path)  # "": all interfaces
    assert token is not None and len(token) >= 2 * MIN_TOKEN and path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert choose_token("", "192.0.2.1", tmp_path) == (token, path)


def test_an_empty_file_is_filled(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("")
    token, path = choose_token("", "", tmp_path)
    assert token is not None and len(token) >= MIN_TOKEN and path is not None
    assert path.read_text() == token + "\n"


@pytest.mark.parametrize("content", [b"\n", b"  \n", b"short\n", b"\xff" * 40])
def test_a_file_without_a_token_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"dashboard\.token holds no token of at least 16 characters"):
        choose_token("", "", tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_the_one_given_wins_and_is_long_enough(tmp_path: Path) -> None:
    assert choose_token(TOKEN, "127.0.0.1", tmp_path) == (TOKEN, None)
    with pytest.raises(ConfigError, match="at least 16 characters"):
        choose_token("short", "", tmp_path)


def test_what_can_not_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't keep the dashboard's token"):
        choose_token("", "", tmp_path / "file")
