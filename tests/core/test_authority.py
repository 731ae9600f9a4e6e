"""The conversation with an ACME authority, against one that checks everything and misbehaves in every way."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acmeserver import AcmeServer
from cryptography import x509

from tunnel.core.issuing import authority
from tunnel.core.issuing.authority import RESULTS, Authority, OrderError, Stopped
from tunnel.core.issuing.challenges import PREFIX, Challenges

NAME = "app.tunnel.test"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "POLL_INTERVAL", 0.02)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AcmeServer]:
    made = AcmeServer(tmp_path_factory.mktemp("authority"))
    yield made
    made.close()


@pytest.fixture
def server(process: AcmeServer) -> AcmeServer:
    process.tell(reset=True)
    return process


class Answers(http.server.BaseHTTPRequestHandler):
    """Stands for the core's plain side."""

    challenges: Challenges

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name, answer = self.challenges._pending.get(self.path.removeprefix(PREFIX), ("", ""))
        self.send_response(200 if name == self.headers["Host"] else 404)
        self.end_headers()
        self.wfile.write(answer.encode())


@pytest.fixture
def challenges(tmp_path: Path, server: AcmeServer) -> Iterator[Challenges]:
    made = Challenges(tmp_path / "acme" / "challenges")
    Answers.challenges = made
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as answering:
        thread = threading.Thread(target=answering.serve_forever)
        thread.start()
        server.tell(http_port=answering.server_address[1])
        yield made
        answering.shutdown()
        thread.join()


@pytest.fixture
def ours(tmp_path: Path, server: AcmeServer, challenges: Challenges) -> Authority:
    return make(tmp_path, server, challenges)


def make(tmp_path: Path, server: AcmeServer, challenges: Challenges, email: str = "", **options: float) -> Authority:
    return Authority(
        server.directory, tmp_path / "acme", challenges, email, str(server.web_ca), **options  # type: ignore[arg-type]
    )  # fmt: skip


def order(ours: Authority, name: str = NAME) -> x509.Certificate:
    issued = ours.order(name, threading.Event())
    return x509.load_pem_x509_certificate(issued.chain_pem.encode())


def failed(ours: Authority, name: str = NAME) -> OrderError:
    with pytest.raises(OrderError) as caught:
        order(ours, name)
    assert caught.value.result in RESULTS and "\n" not in str(caught.value)
    return caught.value


def test_an_order(tmp_path: Path, server: AcmeServer, challenges: Challenges, ours: Authority) -> None:
    server.tell(processing=1)
    issued = ours.order(NAME, threading.Event())
    chain = x509.load_pem_x509_certificates(issued.chain_pem.encode())
    assert len(chain) == 2
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]
    seen = server.seen()
    assert seen["orders"] == [NAME] and [one["code"] for one in seen["fetched"]] == [""]
    assert seen["refused"] == []
    assert list((tmp_path / "acme" / "challenges").iterdir()) == [], "nothing stays to be answered"
    assert not challenges._pending
    for file in ("account.key", "account.json"):
        assert (tmp_path / "acme" / file).stat().st_mode & 0o777 == 0o600


def test_one_account_for_all_orders_with_a_new_key_each(ours: Authority, server: AcmeServer) -> None:
    first, second = order(ours), order(ours, "other.tunnel.test")
    assert first.public_key() != second.public_key()
    assert server.seen()["accounts"] == [[]]


def test_the_contact_is_told_and_told_again_when_it_changes(
    tmp_path: Path, server: AcmeServer, challenges: Challenges
) -> None:
    for email in ("a@example.com", "a@example.com", "b@example.com"):
        order(make(tmp_path, server, challenges, email))
    assert server.seen()["accounts"] == [["mailto:a@example.com"], ["mailto:b@example.com"]]


def test_an_account_whose_address_was_lost_is_found_by_its_key(
    tmp_path: Path, ours: Authority, server: AcmeServer
) -> None:
    order(ours)
    (tmp_path / "acme" / "account.json").write_text("{")
    order(ours)
    assert server.seen()["accounts"] == [[]]


def test_an_authority_that_forgot_us(ours: Authority, server: AcmeServer) -> None:
    order(ours)
    server.tell(forget_accounts=True)
    assert "accountDoesNotExist" in str(failed(ours))
    ours.forget_account()
    order(ours)


def test_bad_nonces_are_tried_again(ours: Authority, server: AcmeServer) -> None:
    server.tell(bad_nonces=3)
    order(ours)
    assert server.seen()["refused"] == ["/account badNonce"] * 3
    server.tell(bad_nonces=1000)
    problem = failed(ours)
    assert problem.result == "refused" and "badNonce" in str(problem)
    assert len(server.seen()["refused"]) == 3 + authority.NONCE_TRIES, "but not for ever"


def test_a_rate_limit_says_when_to_come_again(ours: Authority, server: AcmeServer) -> None:
    server.tell(rate_limit=7200)
    problem = failed(ours)
    assert (problem.result, problem.retry_after) == ("rate_limited", 7200)
    assert "too many certificates" in str(problem)


def test_an_order_that_becomes_invalid(ours: Authority, server: AcmeServer) -> None:
    server.tell(invalid_order=True)
    problem = failed(ours)
    assert problem.result == "invalid" and "CAA record forbids issuance" in str(problem)
    assert NAME in problem.advice


def test_a_challenge_that_fails_says_what_to_look_at(
    ours: Authority, server: AcmeServer, challenges: Challenges, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tell(http_port=9)  # nobody is there
    problem = failed(ours)
    assert problem.result == "invalid" and "Connection refused" in str(problem)
    assert "-http-addr" in problem.advice and NAME in problem.advice
    assert not challenges._pending


def test_another_server_answers_for_the_name(
    ours: Authority, challenges: Challenges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "challenges", Challenges(Path("nowhere")))
    problem = failed(ours)
    assert problem.result == "invalid" and "404" in str(problem)
    assert "another server answers" in problem.advice


@pytest.mark.parametrize(
    ("told", "result", "says", "advice"),
    [
        ({"html": True}, "broken", "no ACME", "-acme-directory"),
        ({"wrong_key": True}, "broken", "another key", ""),
        ({"life": -100.0}, "broken", "clock", ""),
        ({"no_http01": True}, "refused", "http-01", "certbot"),
        ({"fail_5xx": True}, "refused", "503", "tries again"),
    ],
    ids=str,
)
def test_wrong_answers(
    ours: Authority, server: AcmeServer, told: dict[str, object], result: str, says: str, advice: str
) -> None:
    server.tell(**told)
    problem = failed(ours)
    assert problem.result == result and says in str(problem) and advice in problem.advice
    if "fail_5xx" in told:
        assert problem.retry_after == 7


def test_a_name_that_the_authority_does_not_want(ours: Authority) -> None:
    problem = failed(ours, "a.forbidden.test")
    assert problem.result == "refused" and "policy" in str(problem) and "another name" in problem.advice


def test_a_dead_authority(ours: Authority, server: AcmeServer) -> None:
    server.close()
    problem = failed(ours)
    assert problem.result == "unreachable" and "can't be reached" in str(problem)
    server.again()


def test_an_authority_that_is_silent(tmp_path: Path, server: AcmeServer, challenges: Challenges) -> None:
    server.tell(silent=True)
    problem = failed(make(tmp_path, server, challenges, request_timeout=1))
    assert problem.result == "unreachable" and "in time" in str(problem)


def test_an_authority_that_never_decides(tmp_path: Path, server: AcmeServer, challenges: Challenges) -> None:
    server.tell(processing=1000)
    problem = failed(make(tmp_path, server, challenges, order_timeout=2.0))
    assert problem.result == "timeout" and "2 s" in str(problem)


def test_the_core_ends_meanwhile(ours: Authority, server: AcmeServer, challenges: Challenges) -> None:
    server.tell(processing=1000)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        ours.order(NAME, stop)
    assert not challenges._pending


def test_an_authority_whose_own_certificate_is_not_trusted(
    tmp_path: Path, server: AcmeServer, challenges: Challenges
) -> None:
    problem = failed(Authority(server.directory, tmp_path / "acme", challenges))
    assert problem.result == "unreachable" and "not trusted" in str(problem) and "-acme-ca-cert" in problem.advice


def test_a_disk_that_takes_nothing(server: AcmeServer, challenges: Challenges) -> None:
    problem = failed(Authority(server.directory, Path("/proc/no/such"), challenges, ca_cert=str(server.web_ca)))
    assert problem.result == "refused" and "-data-dir" in problem.advice


def test_when_to_renew(ours: Authority, server: AcmeServer) -> None:
    chain = ours.order(NAME, threading.Event()).chain_pem
    wanted, again = ours.renewal_time(chain)
    assert wanted is not None and wanted > time.time() + 86400
    assert 0 < again - time.time() < 120
    server.tell(renew_now=True)
    wanted, _ = ours.renewal_time(chain)
    assert wanted is not None and wanted < time.time()
    server.close()
    with pytest.raises(OrderError):
        ours.renewal_time(chain)
    server.again()
