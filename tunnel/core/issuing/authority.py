"""The conversation with an ACME authority: an account, an order, its challenges, the certificate (RFC 8555).

Everything here blocks and is called in threads. Nothing is kept between two orders but the account: its key and its
address, in the data directory. Whatever goes wrong becomes an OrderError that says whose matter it is and what to do.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunnel import __version__
from tunnel.core.issuing.challenges import Challenges
from tunnel.core.private import write_secret
from tunnel.errors import TunnelError
from tunnel.log import get_logger

if TYPE_CHECKING:
    from acme.client import ClientNetwork, ClientV2
    from acme.messages import AuthorizationResource, ChallengeBody, OrderResource
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from josepy.jwk import JWKEC

log = get_logger("tunnel.core")

REQUEST_TIMEOUT = 20  #: seconds for one answer of the authority
ORDER_TIMEOUT = 150.0  #: seconds for all of an order
POLL_INTERVAL = 1.0  #: seconds, where the authority names none
MAX_POLL_INTERVAL = 15.0
MAX_RETRY_AFTER = 7 * 86400.0  #: the longest that an authority may send us away for
NONCE_TRIES = 8  #: of one request: some authorities refuse nonces at random, to see what clients do

#: how an order ends: tunnel_acme_orders_total{result}
RESULTS = ("ok", "invalid", "rate_limited", "refused", "unreachable", "broken", "timeout")

_PORT = "HTTP port 80 of {name} must lead to -http-addr: look at the firewall and at what else listens there"
_ADVICE = {
    "connection": _PORT,
    "tls": _PORT,
    "dns": "make a DNS record for {name} that leads here",
    "caa": "a CAA record of {name} does not allow this authority: add it there",
    "unauthorized": "another server answers for {name}: its DNS records (A and AAAA) must lead here, and port 80 to "
    "-http-addr",
    "incorrectResponse": "another server answers for {name}: port 80 must lead to -http-addr",
    "rejectedIdentifier": "the authority does not certify {name}: choose another name or authority",
    "unsupportedIdentifier": "the authority does not certify {name}: choose another name or authority",
    "externalAccountRequired": "this authority wants an account from its web site, which the core can't use: choose "
    "another -acme-directory, or use certbot",
    "userActionRequired": "the authority wants something of you: read its message",
    "invalidContact": "correct -acme-email",
    "unsupportedContact": "correct -acme-email",
}


class OrderError(TunnelError):
    """An order failed: one line why. result: a word of RESULTS. advice: what to do. retry_after: seconds, if said."""

    def __init__(self, result: str, reason: str, advice: str = "", retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.result = result
        self.advice = advice
        self.retry_after = retry_after


class Stopped(Exception):
    """The core ends; nobody waits for this order any more."""


@dataclass(frozen=True, slots=True)
class Issued:
    """key_pem and chain_pem as they came, `pem` both as one file."""

    key_pem: str
    chain_pem: str

    @property
    def pem(self) -> str:
        return self.key_pem + self.chain_pem


class Authority:
    """directory_url: RFC 8555, 7.1.1. keep: where the account is kept. ca_cert: PEM file to trust it by, "" the usual.

    Using it accepts the authority's terms of service.
    """

    def __init__(
        self,
        directory_url: str,
        keep: Path,
        challenges: Challenges,
        email: str = "",
        ca_cert: str = "",
        request_timeout: int = REQUEST_TIMEOUT,
        order_timeout: float = ORDER_TIMEOUT,
    ) -> None:
        self._url = directory_url
        self._keep = keep
        self._challenges = challenges
        self._email = email
        self._ca_cert = ca_cert
        self._request_timeout = request_timeout
        self._order_timeout = order_timeout
        self._account_lock = threading.Lock()

    def order(self, name: str, stop: threading.Event) -> Issued:
        """A certificate for this name, with a new key. Raises OrderError, or Stopped once `stop` is set."""
        with _explained(name):
            client, network = self._connect()
            self._enter(client, network)
            return _Order(client, network, self._challenges, name, stop, self._order_timeout).run()

    def renewal_time(self, chain_pem: str) -> tuple[float | None, float]:
        """When the authority wants this certificate renewed (None: it doesn't say), and when to ask again (RFC 9773).

        Both seconds since 1970. Raises OrderError.
        """
        with _explained(""):
            client, _ = self._connect()
            wanted, again = client.renewal_time(chain_pem.encode())
            return (None if wanted is None else wanted.timestamp()), again.timestamp()

    def _connect(self) -> tuple[ClientV2, ClientNetwork]:
        from acme import client as acme_client  # late: 150 ms, and a thread has them

        key = self._account_key()
        network = _make_network(key, self._ca_cert or True, self._request_timeout)
        directory = acme_client.ClientV2.get_directory(self._url, network)
        return acme_client.ClientV2(directory, network), network

    def _account_key(self) -> JWKEC:
        from cryptography.hazmat.primitives import serialization
        from josepy.jwk import JWKEC
        from josepy.util import ComparableECKey

        path = self._keep / "account.key"
        with self._account_lock:
            if not path.exists():
                write_secret(path, _key_pem(_make_key()))
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        return JWKEC(key=ComparableECKey(key))  # type: ignore[arg-type]  # ours is EC

    def _enter(self, client: ClientV2, network: ClientNetwork) -> None:
        """Have an account there: the one that is kept, or a new one."""
        from acme import errors, messages

        path = self._keep / "account.json"
        with self._account_lock:
            kept = _read_json(path)
            if kept.get("uri"):
                network.account = messages.RegistrationResource(
                    uri=kept["uri"], body=messages.Registration()
                )  # a request with an address that is no longer known says accountDoesNotExist
                if kept.get("email", "") == self._email:
                    return
                client.update_registration(network.account, messages.Registration(contact=_contact(self._email)))
            else:
                terms = getattr(client.directory.meta, "terms_of_service", None) if _has_meta(client) else None
                asked = messages.NewRegistration(contact=_contact(self._email), terms_of_service_agreed=True)
                try:
                    network.account = client.new_account(asked)
                except errors.ConflictError as exc:  # our key has an account already
                    network.account = messages.RegistrationResource(uri=exc.location, body=messages.Registration())
                log.info("acme account", directory=self._url, url=network.account.uri, terms=terms or "none")
            write_secret(path, json.dumps({"uri": network.account.uri, "email": self._email}) + "\n")

    def forget_account(self) -> None:
        """The authority does not know it any more; the next order makes a new one with the same key."""
        (self._keep / "account.json").unlink(missing_ok=True)


class _Order:
    """One order on its way."""

    def __init__(
        self,
        client: ClientV2,
        network: ClientNetwork,
        challenges: Challenges,
        name: str,
        stop: threading.Event,
        timeout: float,
    ) -> None:
        self._client = client
        self._network = network
        self._challenges = challenges
        self._name = name
        self._stop = stop
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def run(self) -> Issued:
        from acme import messages

        key = _make_key()
        order = self._client.new_order(_make_csr(key, self._name))
        if not order.uri:
            raise OrderError("broken", "the authority's order has no address", "is -acme-directory right?")
        self._prove(order)
        body = order.body
        if body.status != messages.STATUS_VALID:
            self._client.begin_finalization(order)
            body = self._wait_valid(order)
        chain = self._client._post_as_get(body.certificate).text
        _check_chain(chain, key, self._name)
        return Issued(_key_pem(key), chain)

    def _prove(self, order: OrderResource) -> None:
        """Answer the challenges, and wait until the authority has seen the answers."""
        from acme import messages

        pending = [one for one in order.authorizations if one.body.status != messages.STATUS_VALID]
        try:
            for one in pending:
                challenge = self._choose(one)
                response, text = challenge.response_and_validation(self._network.key)
                self._challenges.put(self._name, challenge.chall.encode("token"), text)
                self._client.answer_challenge(challenge, response)
            for one in pending:
                self._wait_proven(one)
        finally:
            self._challenges.drop(self._name)

    def _choose(self, one: AuthorizationResource) -> ChallengeBody:
        for challenge in one.body.challenges:
            if challenge.chall.typ == "http-01":
                return challenge
        raise OrderError("refused", "the authority offers no http-01 challenge", "use certbot with a DNS plug-in")

    def _wait_proven(self, one: AuthorizationResource) -> None:
        from acme import messages

        while True:
            found, response = self._client.poll(one)
            status = found.body.status
            if status == messages.STATUS_VALID:
                return
            if status not in (messages.STATUS_PENDING, messages.STATUS_PROCESSING):
                failed = [challenge.error for challenge in found.body.challenges if challenge.error is not None]
                code, text = _read_problem(failed[0]) if failed else ("", f"the authorization is {status.name}")
                raise OrderError("invalid", text, _advice(code, self._name))
            self._pause(response)

    def _wait_valid(self, order: OrderResource) -> Any:
        from acme import messages

        while True:
            response = self._client._post_as_get(order.uri)
            body = messages.Order.from_json(response.json())
            if body.status == messages.STATUS_VALID:
                if body.certificate is None:
                    raise OrderError("broken", "the authority's order is valid and has no certificate")
                return body
            if body.status == messages.STATUS_INVALID:
                code, text = _read_problem(body.error) if body.error else ("", "the order became invalid")
                raise OrderError("invalid", text, _advice(code, self._name))
            self._pause(response)

    def _pause(self, response: Any) -> None:
        """Before the next look, as long as the authority wants. Raises OrderError("timeout") and Stopped."""
        wanted = _retry_after(response.headers.get("Retry-After", ""))
        seconds = min(max(wanted, POLL_INTERVAL), MAX_POLL_INTERVAL)
        if time.monotonic() + seconds > self._deadline:
            raise OrderError("timeout", f"the authority has not decided within {self._timeout:g} s")
        if self._stop.wait(seconds):
            raise Stopped


# What the library gives and takes -------------------------------------------------------------------------------


def _make_network(key: JWKEC, verify: str | bool, timeout: int) -> ClientNetwork:
    from acme import client, messages
    from josepy.jwa import ES256

    class Network(client.ClientNetwork):
        """Also knows how long the authority sends us away for, and tries other nonces."""

        retry_after = 0.0

        def _send_request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            response = super()._send_request(method, url, *args, **kwargs)
            self.retry_after = 0.0 if response.ok else _retry_after(response.headers.get("Retry-After", ""))
            return response

        def post(self, *args: Any, **kwargs: Any) -> Any:
            for left in reversed(range(NONCE_TRIES)):
                try:
                    return self._post_once(*args, **kwargs)
                except messages.Error as exc:
                    exc.retry_after = self.retry_after
                    if exc.code != "badNonce" or not left:
                        raise
                    self._nonces.clear()  # the others are as old
            raise AssertionError

    network = Network(key, alg=ES256, user_agent=f"trio-tunnel/{__version__}", timeout=timeout)
    network.verify_ssl = verify  # type: ignore[assignment]  # requests takes a path too
    return network


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the library raises into OrderErrors."""
    try:
        yield
    except (OrderError, Stopped):
        raise
    except Exception as exc:
        raise _explain(exc, name) from exc


def _explain(exc: Exception, name: str) -> OrderError:
    """(1) a problem document of the authority; (2) no answer; (3) our own disk; (4) an answer that is no ACME."""
    import requests
    from acme import errors, messages

    if isinstance(exc, messages.Error):
        code, text = _read_problem(exc)
        retry_after = getattr(exc, "retry_after", 0.0)
        if code == "rateLimited":
            return OrderError("rate_limited", text, "the core waits as long as the authority asks for", retry_after)
        return OrderError("refused", text, _advice(code, name), retry_after)
    if isinstance(exc, errors.ClientError) and exc.args and isinstance(exc.args[0], requests.Response):
        response = exc.args[0]
        retry_after = _retry_after(response.headers.get("Retry-After", ""))
        if response.status_code == 429:
            return OrderError("rate_limited", "too many requests", "", retry_after)
        advice = "is -acme-directory right?" if response.status_code < 500 else "it should pass; the core tries again"
        return OrderError("refused", f"the authority answered {response.status_code}", advice, retry_after)
    if isinstance(exc, requests.exceptions.SSLError):
        advice = "is -acme-directory right? With an authority of your own give -acme-ca-cert"
        return OrderError("unreachable", "the authority's own certificate is not trusted", advice)
    if isinstance(exc, (requests.exceptions.ConnectionError, requests.exceptions.Timeout)):
        kind = "does not answer in time" if isinstance(exc, requests.exceptions.Timeout) else "can't be reached"
        return OrderError("unreachable", f"the authority {kind}", "this machine must reach -acme-directory over https")
    if isinstance(exc, OSError) and not isinstance(exc, requests.exceptions.RequestException):
        return OrderError("refused", f"can't keep it: {exc.strerror or type(exc).__name__}", "look at -data-dir")
    text = " ".join(str(exc).split())[:200]
    return OrderError("broken", f"the authority's answer is no ACME ({text})", "is -acme-directory right?")


def _read_problem(problem: Any) -> tuple[str, str]:
    """(code, text) of a problem document, of its first subproblem where there is one."""
    for one in (*(problem.subproblems or ()), problem):
        if one.detail or one is problem:
            code = str(one.typ).rpartition(":")[2]
            text = " ".join(str(one.detail or problem.detail or problem.title or "").split())[:500]
            return code, f"{code}: {text}" if text else code
    raise AssertionError


def _advice(code: str, name: str) -> str:
    return _ADVICE.get(code, "").format(name=name or "the name")


def _retry_after(field: str) -> float:
    """Seconds of a Retry-After field (RFC 9110, 10.2.3); 0 for none."""
    from email.utils import parsedate_to_datetime

    text = field.strip()
    if text.isascii() and text.isdigit() and len(text) < 12:
        seconds = float(text)
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _has_meta(client: ClientV2) -> bool:
    return "meta" in client.directory.to_partial_json()


def _contact(email: str) -> tuple[str, ...]:
    return (f"mailto:{email}",) if email else ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# Keys and certificates ------------------------------------------------------------------------------------------


def _make_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_pem(key: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives import serialization as s

    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()


def _make_csr(key: EllipticCurvePrivateKey, name: str) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _check_chain(chain: str, key: EllipticCurvePrivateKey, name: str) -> None:
    """Is this for our key, our name, and now? Raises OrderError."""
    from cryptography import x509

    wrong: Callable[[str], OrderError] = lambda what: OrderError("broken", f"the certificate that came {what}")  # noqa: E731
    try:
        leaf = x509.load_pem_x509_certificates(chain.encode())[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        raise wrong("can't be read") from None
    if leaf.public_key() != key.public_key():
        raise wrong("is for another key")
    if name not in names.get_values_for_type(x509.DNSName):
        raise wrong("is for another name")
    if (
        not leaf.not_valid_before_utc.timestamp() <= time.time() + 300
        or leaf.not_valid_after_utc.timestamp() < time.time()
    ):
        raise wrong("is not valid now: is this machine's clock right?")
