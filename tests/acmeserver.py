"""An ACME authority (RFC 8555) for tests: it checks what a real one checks, and misbehaves when told to.

    server = AcmeServer(tmp_path)              # a process; https on 127.0.0.1 with a certificate of tmp_path/web-ca.pem
    server.directory, server.web_ca            # what -acme-directory and -acme-ca-cert are given
    server.root                                # PEM of the authority itself: what visitors trust
    server.tell(http_port=8080)                # where it reads challenges, for whatever name: 127.0.0.1:8080
    server.tell(bad_nonces=2, …)               # see Orders to it
    server.seen()                              # {"orders": [names…], "accounts": [contacts…], "fetched": […], …}
    server.close(); server.again()             # dead; back on the same port with the same keys and no accounts

Checked: JWS signatures (ES256, RS256) with the account's key, `url`, `kid` or `jwk`, nonces (each good once), that the
account agreed to the terms, orders' and authorizations' states, that the challenge's answer is the key authorization
and was fetched over HTTP from the name's own server, the CSR's signature and names.

Orders to it: http_port, life (seconds of a certificate), processing (polls before an order is valid), bad_nonces (so
many requests are refused so), rate_limit (Retry-After of all new orders; 0: none), html (new orders answered with a
page), silent (new orders are not answered), invalid_order (finalized orders become invalid), wrong_key (certificates
for another key), no_http01, renew_now (RFC 9773 says so), forget_accounts, fail_5xx,
reset (all of it, and what was seen).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.client
import http.server
import ipaddress
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

ERROR = "urn:ietf:params:acme:error:"
TERMS = "https://authority.test/terms"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(text: str) -> int:
    return int.from_bytes(unb64(text), "big")


class Problem(Exception):
    """An answer of type application/problem+json."""

    def __init__(self, status: int, code: str, detail: str, **fields: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.fields = status, code, fields


def public_key(jwk: dict[str, str]) -> Any:
    if jwk["kty"] == "EC":
        curve = {"P-256": ec.SECP256R1}[jwk["crv"]]()
        return ec.EllipticCurvePublicNumbers(number(jwk["x"]), number(jwk["y"]), curve).public_key()
    return rsa.RSAPublicNumbers(number(jwk["e"]), number(jwk["n"])).public_key()


def thumbprint(jwk: dict[str, str]) -> str:
    """RFC 7638."""
    members = {"EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n")}[jwk["kty"]]
    text = json.dumps({name: jwk[name] for name in members}, separators=(",", ":"), sort_keys=True)
    return b64(hashlib.sha256(text.encode()).digest())


def verify(jwk: dict[str, str], alg: str, signed: bytes, signature: bytes) -> None:
    """Raises InvalidSignature."""
    key = public_key(jwk)
    if alg == "ES256":
        half = len(signature) // 2
        pair = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        key.verify(encode_dss_signature(*pair), signed, ec.ECDSA(hashes.SHA256()))
    elif alg == "RS256":
        key.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
    else:
        raise Problem(400, "badSignatureAlgorithm", f"{alg} is not taken here")


# The authority's own certificate ---------------------------------------------------------------------------------


class Root:
    """Signs. In a file, so that a server that comes back is the same authority."""

    def __init__(self, directory: Path, name: str) -> None:
        self.cert_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
        if not self.cert_path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            now = datetime.datetime.now(datetime.UTC)
            who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            made = (
                x509.CertificateBuilder()
                .subject_name(who)
                .issuer_name(who)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1))
                .not_valid_after(now + datetime.timedelta(days=365))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .add_extension(
                    x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
                )
                .sign(key, hashes.SHA256())
            )
            key_path.write_bytes(pem_of(key))
            self.cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        self._key: Any = serialization.load_pem_private_key(key_path.read_bytes(), None)
        self.cert = x509.load_pem_x509_certificate(self.cert_path.read_bytes())

    def sign(
        self, key: Any, names: list[str], life: float, addresses: Sequence[str] = (), now: float | None = None
    ) -> str:
        """The chain. life: seconds, from `now` (the real one)."""
        begin = datetime.datetime.fromtimestamp(now or time.time(), datetime.UTC).replace(microsecond=0)
        general: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        general += [x509.IPAddress(ipaddress.ip_address(one)) for one in addresses]
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.cert.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin - datetime.timedelta(seconds=1 - 2 * min(life, 0)))
            .not_valid_after(begin + datetime.timedelta(seconds=life))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(general), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.cert.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return (made.public_bytes(serialization.Encoding.PEM) + self.cert_path.read_bytes()).decode()


def pem_of(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


# The server ------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    jwk: dict[str, str]
    contact: list[str]


@dataclass
class Authz:
    name: str
    account: str
    token: str = field(default_factory=lambda: b64(secrets.token_bytes(32)))
    status: str = "pending"
    error: dict[str, Any] | None = None


@dataclass
class Order:
    name: str
    account: str
    authz: str
    status: str = "pending"
    polls: int = 0
    certificate: str = ""
    error: dict[str, Any] | None = None


class State:
    def __init__(self, directory: Path) -> None:
        self.root = Root(directory, "authority")
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.orders: dict[str, Order] = {}
        self.authzs: dict[str, Authz] = {}
        self.chains: dict[str, str] = {}
        self.nonces: set[str] = set()
        self.log: dict[str, list[Any]] = {"orders": [], "accounts": [], "fetched": [], "refused": [], "issued": []}
        self.told: dict[str, Any] = {
            "http_port": 80, "life": 90 * 86400.0, "processing": 0, "bad_nonces": 0, "rate_limit": 0, "html": False,
            "silent": False, "invalid_order": False, "wrong_key": False, "no_http01": False, "renew_now": False,
            "fail_5xx": False,
        }  # fmt: skip

    def nonce(self) -> str:
        made = b64(secrets.token_bytes(16))
        self.nonces.add(made)
        return made


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    base: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(200, b"")

    def do_GET(self) -> None:
        state = self.state
        if self.path == "/directory":
            names = {name: f"{self.base}/{path}" for name, path in (
                ("newNonce", "nonce"), ("newAccount", "account"), ("newOrder", "order"), ("revokeCert", "revoke"),
                ("keyChange", "key"), ("renewalInfo", "renewal"),
            )}  # fmt: skip
            self.json(200, {**names, "meta": {"termsOfService": TERMS}})
        elif self.path == "/nonce":
            self.answer(204, b"")
        elif self.path.startswith("/renewal/"):
            now = datetime.datetime.now(datetime.UTC)
            start = now - datetime.timedelta(hours=1) if state.told["renew_now"] else now + datetime.timedelta(days=60)
            window = {"start": start.isoformat(), "end": (start + datetime.timedelta(minutes=1)).isoformat()}
            self.json(200, {"suggestedWindow": window}, ("Retry-After", "60"))
        elif self.path == "/control":
            with state.lock:
                self.json(200, state.log)
        else:
            self.json(404, {"type": "about:blank", "detail": "no such thing"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/control":
            told = json.loads(raw)
            with self.state.lock:
                if told.pop("reset", False):
                    self.state.reset()
                if told.pop("forget_accounts", False):
                    self.state.accounts.clear()
                self.state.told.update(told)
            self.json(200, {})
            return
        try:
            with self.state.lock:
                result = self.take(raw)
        except Problem as exc:
            with self.state.lock:
                self.state.log["refused"].append(f"{self.path} {exc.code}")
            retry = [("Retry-After", exc.fields["retry_after"])] if "retry_after" in exc.fields else []
            body = {"type": ERROR + exc.code, "detail": str(exc), "status": exc.status}
            self.json(exc.status, body, *retry, kind="application/problem+json")
            return
        if result is None:
            time.sleep(3600)  # silent
        else:
            status, body, *fields = result
            if isinstance(body, str):
                self.answer(status, body.encode(), *fields)
            else:
                self.json(status, body, *fields)

    # What came

    def take(self, raw: bytes) -> Any:
        state, path = self.state, self.path
        if self.headers["Content-Type"] != "application/jose+json":
            raise Problem(415, "malformed", "not application/jose+json")
        jws = json.loads(raw)
        header = json.loads(unb64(jws["protected"]))
        if header.get("nonce") not in state.nonces:
            raise Problem(400, "badNonce", "this nonce is not known")
        state.nonces.discard(header["nonce"])
        if state.told["bad_nonces"]:
            state.told["bad_nonces"] -= 1
            raise Problem(400, "badNonce", "not this one, today")
        if header.get("url") != self.base + path:
            raise Problem(400, "malformed", "signed for another address")
        kid = header.get("kid", "")
        if path == "/account":
            if "jwk" not in header or kid:
                raise Problem(400, "malformed", "a new account's request has a jwk and no kid")
            jwk = header["jwk"]
        else:
            if "jwk" in header or kid not in state.accounts:
                raise Problem(400, "accountDoesNotExist", "there is no such account")
            jwk = state.accounts[kid].jwk
        try:
            verify(jwk, header["alg"], f"{jws['protected']}.{jws['payload']}".encode(), unb64(jws["signature"]))
        except InvalidSignature:
            raise Problem(400, "malformed", "the signature is wrong") from None
        payload = json.loads(unb64(jws["payload"])) if jws["payload"] else None
        return self.serve(path.strip("/").split("/"), kid, jwk, payload)

    def serve(self, path: list[str], kid: str, jwk: dict[str, str], payload: Any) -> Any:
        state = self.state
        if path == ["account"]:
            return self.new_account(jwk, payload)
        if path[0] == "account":
            state.accounts[kid].contact = payload["contact"]
            state.log["accounts"].append(payload["contact"])
            return 200, {"status": "valid", "contact": payload["contact"]}
        if path == ["order"]:
            return self.new_order(kid, payload)
        if path[0] == "authz":
            return 200, self.show_authz(path[1])
        if path[0] == "challenge":
            one = state.authzs[path[1]]
            if payload is not None and one.status == "pending":
                one.status = "processing"
                threading.Thread(target=self.validate, args=(one, thumbprint(jwk)), daemon=True).start()
            up = ("Link", f'<{self.base}/authz/{path[1]}>;rel="up"')
            return 200, self.show_challenge(path[1]), up
        if path[0] == "order":
            order = state.orders[path[1]]
            if order.account != kid:
                raise Problem(403, "unauthorized", "another account's order")
            if path[2:] == ["finalize"]:
                self.finalize(path[1], order, payload)
            elif order.status == "processing":
                order.polls += 1
                if order.polls > state.told["processing"]:
                    order.status = "valid"
            wait = [("Retry-After", "1")] if order.status == "processing" else []
            return (200, self.show_order(path[1]), *wait)
        if path[0] == "cert":
            return 200, state.chains[path[1]], ("Content-Type", "application/pem-certificate-chain")
        raise Problem(404, "malformed", "no such thing")

    def new_account(self, jwk: dict[str, str], payload: Any) -> Any:
        state = self.state
        uri = f"{self.base}/account/{thumbprint(jwk)}"
        status = 200
        if uri not in state.accounts:
            if payload.get("onlyReturnExisting"):
                raise Problem(400, "accountDoesNotExist", "there is no such account")
            if payload.get("termsOfServiceAgreed") is not True:
                raise Problem(403, "userActionRequired", "agree to the terms first")
            state.accounts[uri] = Account(jwk, payload.get("contact", []))
            state.log["accounts"].append(payload.get("contact", []))
            status = 201
        return status, {"status": "valid", "contact": state.accounts[uri].contact}, ("Location", uri)

    def new_order(self, kid: str, payload: Any) -> Any:
        state = self.state
        told = state.told
        names = [one["value"] for one in payload["identifiers"] if one["type"] == "dns"]
        state.log["orders"] += names
        if told["rate_limit"]:
            raise Problem(429, "rateLimited", "too many certificates", retry_after=str(told["rate_limit"]))
        if told["fail_5xx"]:
            return 503, "<h1>down for maintenance</h1>", ("Content-Type", "text/html"), ("Retry-After", "7")
        if told["html"]:
            return 200, "<h1>Welcome to nginx!</h1>", ("Content-Type", "text/html")
        if told["silent"]:
            return None
        if names[0].endswith(".forbidden.test"):
            raise Problem(400, "rejectedIdentifier", "policy forbids issuing for this name")
        key = b64(secrets.token_bytes(9))
        state.authzs[key] = Authz(names[0], kid)
        state.orders[key] = Order(names[0], kid, key)
        return 201, self.show_order(key), ("Location", f"{self.base}/order/{key}")

    def finalize(self, key: str, order: Order, payload: Any) -> None:
        state = self.state
        if order.status != "ready":
            raise Problem(403, "orderNotReady", "the order is not ready")
        request = x509.load_der_x509_csr(unb64(payload["csr"]))
        found = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if not request.is_signature_valid or found.get_values_for_type(x509.DNSName) != [order.name]:
            raise Problem(400, "badCSR", "the request is not for the order's names")
        if state.told["invalid_order"]:
            order.status = "invalid"
            order.error = {"type": ERROR + "caa", "detail": "CAA record forbids issuance"}
            return
        public: Any = request.public_key()
        if state.told["wrong_key"]:
            public = ec.generate_private_key(ec.SECP256R1()).public_key()
        state.chains[key] = state.root.sign(public, [order.name], state.told["life"])
        state.log["issued"].append(order.name)
        order.status = "processing" if state.told["processing"] else "valid"

    def validate(self, one: Authz, print_: str) -> None:
        """RFC 8555, 8.3: fetch it from the name's own server."""
        path = f"/.well-known/acme-challenge/{one.token}"
        code, detail = "", ""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.state.told["http_port"], timeout=5)
            connection.request("GET", path, headers={"Host": one.name, "User-Agent": "validation"})
            answer = connection.getresponse()
            text = answer.read(4096).decode().rstrip()
            connection.close()
            if answer.status != 200:
                code, detail = "unauthorized", f"invalid response from http://{one.name}{path}: {answer.status}"
            elif text != f"{one.token}.{print_}":
                code, detail = "unauthorized", "the key authorization is wrong"
        except OSError as exc:
            code, detail = "connection", f"fetching http://{one.name}{path}: {exc.strerror or exc}"
        with self.state.lock:
            self.state.log["fetched"].append({"name": one.name, "token": one.token, "code": code})
            one.status = "invalid" if code else "valid"
            one.error = {"type": ERROR + code, "detail": detail} if code else None
            for order in self.state.orders.values():
                if self.state.authzs[order.authz] is one:
                    order.status = "invalid" if code else "ready"

    # What goes back

    def show_order(self, key: str) -> dict[str, Any]:
        order = self.state.orders[key]
        shown: dict[str, Any] = {
            "status": order.status,
            "identifiers": [{"type": "dns", "value": order.name}],
            "authorizations": [f"{self.base}/authz/{order.authz}"],
            "finalize": f"{self.base}/order/{key}/finalize",
        }
        if order.status == "valid":
            shown["certificate"] = f"{self.base}/cert/{key}"
        if order.error:
            shown["error"] = order.error
        return shown

    def show_authz(self, key: str) -> dict[str, Any]:
        one = self.state.authzs[key]
        status = "pending" if one.status == "processing" else one.status
        return {
            "status": status,
            "identifier": {"type": "dns", "value": one.name},
            "challenges": [self.show_challenge(key)],
            "expires": "2099-01-01T00:00:00Z",
        }

    def show_challenge(self, key: str) -> dict[str, Any]:
        one = self.state.authzs[key]
        kind = "dns-01" if self.state.told["no_http01"] else "http-01"
        shown: dict[str, Any] = {"type": kind, "url": f"{self.base}/challenge/{key}", "token": one.token}
        shown["status"] = one.status
        return {**shown, "error": one.error} if one.error else shown

    def json(self, status: int, body: Any, *fields: tuple[str, str], kind: str = "application/json") -> None:
        self.answer(status, json.dumps(body).encode(), ("Content-Type", kind), *fields)

    def answer(self, status: int, body: bytes, *fields: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in fields:
            self.send_header(name, value)
        with self.state.lock:
            self.send_header("Replay-Nonce", self.state.nonce())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients that leave are no fault
            super().handle_error(request, client_address)


def serve(directory: Path, port: int) -> None:
    """Says its port on standard output, and serves until it is ended."""
    web = Root(directory, "web-ca")
    key = ec.generate_private_key(ec.SECP256R1())
    cert, key_path = directory / "web.pem", directory / "web.key"
    cert.write_text(web.sign(key.public_key(), ["localhost"], 86400, ["127.0.0.1"]))
    key_path.write_bytes(pem_of(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key_path)
    server = _Server(("127.0.0.1", port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    Handler.state = State(directory)
    Handler.base = f"https://127.0.0.1:{server.server_address[1]}"
    print(server.server_address[1], flush=True)
    server.serve_forever()


class AcmeServer:
    """The process, as tests see it."""

    def __init__(self, directory: Path, **told: Any) -> None:
        self.path = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self.again(**told)
        self.web_ca = directory / "web-ca.pem"
        self.root = directory / "authority.pem"
        self.directory = f"https://127.0.0.1:{self.port}/directory"

    def again(self, **told: Any) -> None:
        command = [sys.executable, __file__, str(self.path), str(self.port)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        if told:
            self.tell(**told)

    def tell(self, **told: Any) -> None:
        self._ask(json.dumps(told).encode())

    def seen(self) -> dict[str, Any]:
        return dict(json.loads(self._ask(None)))

    def _ask(self, body: bytes | None) -> bytes:
        context = ssl.create_default_context(cafile=self.path / "web-ca.pem")
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(f"https://127.0.0.1:{self.port}/control", body, 10) as answer:
            return bytes(answer.read())

    def trust(self) -> ssl.SSLContext:
        """Of a visitor who trusts this authority and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.root)
        return context

    def visit(self, where: tuple[str, int], name: str) -> ssl.SSLSocket:
        """A connection of such a visitor. Raises ssl.SSLError."""
        return self.trust().wrap_socket(socket.create_connection(where, 10), server_hostname=name)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def certificate_of(where: tuple[str, int], name: str) -> x509.Certificate:
    """What is served under this name now, trusted or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(where, 10) as plain, context.wrap_socket(plain, server_hostname=name) as secured:
        raw = secured.getpeercert(binary_form=True)
    assert raw is not None
    return x509.load_der_x509_certificate(raw)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
