"""Certificates of a listener: chosen by name, read again, kept when the new ones are bad, and nothing below TLS 1.2."""

import datetime
import logging
import socket
import ssl
import sys
import threading
import warnings
from pathlib import Path

import pytest
import trustme

from tunnel.core.certificates import Certificates, Pair, ignore_odd_names, pairs_in, read_pair
from tunnel.errors import ConfigError

CA = trustme.CA()


def write(directory: Path, *names: str, cert: str = "fullchain.pem", key: str = "privkey.pem", year: int = 0) -> Pair:
    """A new certificate for these names, as certbot keeps it unless other file names are given; for this year only."""
    directory.mkdir(parents=True, exist_ok=True)
    begin, end = (datetime.datetime(each, 1, 1, tzinfo=datetime.UTC) if year else None for each in (year, year + 1))
    issued = CA.issue_cert(*names, not_before=begin, not_after=end)
    pair = Pair(directory / cert, directory / key)
    pair.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    pair.key.write_bytes(issued.private_key_pem.bytes())
    return pair


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> tuple[str, str]:
    """(version, first DNS name of the certificate that came). Raises ssl.SSLError as the client sees it."""
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(near, server_side=True).close()
        except OSError:
            near.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(far, server_hostname=name) as wrapped:
            found = wrapped.getpeercert() or {}
            names = [value for kind, value in found.get("subjectAltName", ()) if kind == "DNS"]  # type: ignore[misc]
            return wrapped.version() or "", str(names[0])
    finally:
        thread.join(10)
        far.close()


def client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    context.check_hostname = False
    return context


def seen(certificates: Certificates, name: str | None) -> str:
    return shake_hands(certificates.context, client(), name)[1]


def test_the_certificate_is_chosen_by_name(tmp_path: Path) -> None:
    default = write(tmp_path / "default", "default.example")
    live = tmp_path / "live"
    write(live / "a", "a.example", "b.example")
    write(live / "wild", "*.t.example")
    write(live, "plain.example", cert="plain.crt", key="plain.key")
    certificates = Certificates("public", default, [live])
    assert seen(certificates, "b.example") == "a.example"
    assert seen(certificates, "B.Example") == "a.example"
    assert seen(certificates, "x.t.example") == "*.t.example"
    assert seen(certificates, "plain.example") == "plain.example"
    for other in ("t.example", "x.y.t.example", "nobody.example", None):
        assert seen(certificates, other) == "default.example"


def test_without_a_default_unknown_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "a.example")
    certificates = Certificates("public", None, [tmp_path])
    assert seen(certificates, "a.example") == "a.example"
    for name in ("b.example", None):
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            seen(certificates, name)
    assert certificates.fingerprint == ""


def test_nothing_below_tls_1_2(tmp_path: Path) -> None:
    certificates = Certificates("public", write(tmp_path, "a.example"))
    for version, number in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
        newer = client()
        newer.minimum_version = newer.maximum_version = version
        assert shake_hands(certificates.context, newer, "a.example")[0] == number
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        shake_hands(certificates.context, old_client(), "a.example")


def old_client() -> ssl.SSLContext:
    """One that offers TLS 1.1 at most, and would take it."""
    old = client()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    return old


def test_an_old_client_is_one() -> None:
    """It is the server's refusal that the test above sees: two such ends do agree."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("a.example").configure_cert(server)
    server.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server.minimum_version = ssl.TLSVersion.TLSv1
    assert shake_hands(server, old_client(), "a.example")[0] == "TLSv1.1"


async def test_reload(tmp_path: Path) -> None:
    """As certbot does it: the files are links, and the links are replaced."""
    default = write(tmp_path / "default", "default.example")
    live, archive = tmp_path / "live", tmp_path / "archive"
    (live / "a").mkdir(parents=True)

    def point_at(pair: Pair) -> None:
        for link, target in ((live / "a/fullchain.pem", pair.cert), (live / "a/privkey.pem", pair.key)):
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    point_at(write(archive / "1", "a.example", "one.example"))
    certificates = Certificates("public", default, [live])
    before = certificates.fingerprint
    context = certificates.context
    point_at(write(archive / "2", "a.example", "two.example"))
    write(tmp_path / "default", "new.example")
    write(live / "b", "b.example")
    assert seen(certificates, "two.example") == "default.example"
    await certificates.reload()
    assert seen(certificates, "two.example") == "a.example"
    assert seen(certificates, "b.example") == "b.example"
    assert seen(certificates, "one.example") == "new.example"
    assert certificates.fingerprint != before and certificates.context is not context
    (live / "a/fullchain.pem").unlink()
    await certificates.reload()
    assert seen(certificates, "two.example") == "new.example"


async def test_what_is_bad_keeps_its_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    default = write(tmp_path / "default", "default.example")
    live = tmp_path / "live"
    write(live / "a", "a.example")
    write(live / "b", "b.example")
    certificates = Certificates("public", default, [live])
    default.cert.write_text("no certificate")
    (live / "a/privkey.pem").write_bytes((live / "b/privkey.pem").read_bytes())
    write(live / "b", "new.example")
    await certificates.reload()
    assert seen(certificates, None) == "default.example"
    assert seen(certificates, "a.example") == "a.example"
    assert seen(certificates, "new.example") == "new.example"
    errors = [record.fields for record in caplog.records if record.levelno == logging.ERROR]  # type: ignore[attr-defined]
    assert [(one["file"], one["listener"]) for one in errors] == [
        (str(default.cert), "public"), (str(live / "a/fullchain.pem"), "public")
    ]  # fmt: skip
    assert "is not PEM" in errors[0]["error"] and "is not the key of the certificate" in errors[1]["error"]
    assert {record.getMessage() for record in caplog.records if record.levelno == logging.ERROR} == {
        "can't use a certificate; the old one stays"
    }
    for path in (live / "a", live / "b"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    live.rmdir()
    await certificates.reload()
    assert seen(certificates, "new.example") == "new.example"


def test_expiry_and_names(tmp_path: Path) -> None:
    pair = write(tmp_path, "A.example", "b.example")
    loaded = read_pair(pair)
    assert loaded.names == ("a.example", "b.example")
    assert loaded.fingerprint.startswith("sha256:") and len(loaded.fingerprint) == 71
    assert Certificates("agent", pair).expiry == loaded.expiry > 1.7e9


def test_starts_that_fail(tmp_path: Path) -> None:
    pair = write(tmp_path, "a.example")
    pair.key.write_text("no key")
    with pytest.raises(ConfigError, match=r"^-agent-cert, -agent-key: .*privkey.pem is not PEM"):
        Certificates("agent", pair)
    with pytest.raises(ConfigError, match=r"^can't use a certificate of the core's own .*; remove .*chain.pem and "):
        Certificates("agent", pair, is_ours=True)
    (tmp_path / "live").mkdir()
    for directory, said in (
        (tmp_path / "missing", "missing does not exist$"),
        (pair.cert, "is a file, and a directory is wanted"),
        (tmp_path / "live", "there is no NAME.crt or NAME.pem with its NAME.key in .*live"),
    ):
        with pytest.raises(ConfigError, match=rf"^-public-cert-dir: .*{said}"):
            Certificates("public", None, [directory])
    for name in ("a", "b"):
        write(tmp_path / "live" / name, "a.example").key.write_text("no key")
    with pytest.raises(ConfigError, match=r"privkey.pem is not PEM.* \(1 more can't be used\)$"):
        Certificates("public", None, [tmp_path / "live"])


@pytest.mark.parametrize(
    ("names", "is_for_others"),
    [
        (("*.t.example",), False),
        (("app.t.example",), False),  # one tunnel, and its name
        (("t.example",), True),
        (("www.example", "*.other.example"), True),
    ],
)
def test_a_certificate_for_other_names_than_the_tunnels(
    names: tuple[str, ...], is_for_others: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Certificates("public", write(tmp_path, *names), base_domain="t.example")
    Certificates("agent", write(tmp_path, *names))
    said = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    advice = "browsers will warn those who open NAME.t.example: get one for *.t.example, or correct -base-domain"
    expected = {"listener": "public", "names": sorted(names), "advice": advice}
    assert said == ([expected] if is_for_others else [])


def test_a_certificate_of_another_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for year, said in ((2001, "certificate has expired"), (9001, "certificate is not valid yet")):
        Certificates("public", write(tmp_path, "a.example", year=year))
        [record] = caplog.records
        assert record.getMessage() == said
        assert record.fields["advice"]  # type: ignore[attr-defined]
        caplog.clear()


async def test_what_another_process_has_said_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Certificates("public", write(tmp_path, "a.example", year=2001), is_said=True)
    assert not caplog.records
    await made.reload()
    assert "certificate has expired" in caplog.messages


def test_what_counts_as_a_pair(tmp_path: Path) -> None:
    for name in ("a.crt", "a.key", "b.pem", "b.key", "c.pem", ".d.pem", ".d.key", "README"):
        (tmp_path / name).touch()
    (tmp_path / "e").mkdir()
    (tmp_path / "f").mkdir()
    (tmp_path / "f/fullchain.pem").touch()
    (tmp_path / "g.pem").write_text("-----BEGIN PRIVATE KEY-----")  # both in one file, as HAProxy keeps them
    (tmp_path / "h.pem").mkdir()
    found = pairs_in(tmp_path)
    assert [pair.cert.relative_to(tmp_path).as_posix() for pair in found] == [
        "a.crt", "b.pem", "f/fullchain.pem", "g.pem"
    ]  # fmt: skip
    assert found[-1].key == found[-1].cert


async def test_certificates_that_come_and_go(tmp_path: Path) -> None:
    asked: list[str] = []
    default = write(tmp_path / "default", "default.example", "*.t.example")
    certificates = Certificates("public", default, [tmp_path / "d"])
    certificates.on_missing = asked.append
    for name in ("New.Example", "default.example", "a.t.example", "b.a.t.example"):
        assert seen(certificates, name) == "default.example"
    assert seen(certificates, None) == "default.example"
    assert asked == ["new.example", "b.a.t.example"], "what the default is for is not missed"
    pair = write(tmp_path / "d" / "new", "new.example")
    loaded = await certificates.add(pair)
    assert seen(certificates, "new.example") == "new.example" and len(asked) == 2
    assert certificates.loaded_from(pair.cert.parent) == [(pair, loaded)]
    assert loaded.begin < loaded.expiry
    await certificates.reload()
    assert seen(certificates, "new.example") == "new.example", "the directory has it"
    pair.key.write_text("no key")
    with pytest.raises(ValueError, match=r"PEM|KEY"):
        await certificates.add(pair)
    assert seen(certificates, "new.example") == "new.example"
    certificates.forget(pair)
    certificates.forget(default)  # which stays all the same
    assert seen(certificates, "new.example") == "default.example"


def test_names_that_are_no_ascii_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    ignore_odd_names()
    write(tmp_path, "a.example", cert="a.crt", key="a.key")
    context = Certificates("public", None, [tmp_path]).context
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = client().wrap_bio(incoming, outgoing, server_hostname="aaaaaa.example")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    there.write(outgoing.read().replace(b"aaaaaa", b"\xff" * 6))
    with pytest.raises(ssl.SSLError):
        context.wrap_bio(there, back, server_side=True).do_handshake()
    assert capfd.readouterr().err == ""
