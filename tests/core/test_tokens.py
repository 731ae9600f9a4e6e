"""Tokens and JWTs: what is taken, what is refused and in which words."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

from tunnel.core import tokens
from tunnel.core.tokens import LEEWAY, JwtVerifier, hash_token, is_hash_equal, make_token
from tunnel.errors import ConfigError, Refused

SECRET = "a secret of at least thirty-two bytes, surely"
NOW = 1_800_000_000.0


def test_tokens_are_long_random_and_one_word() -> None:
    made = {make_token() for _ in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch(r"tt_[0-9A-Za-z]{43}", token) for token in made)
    assert len(tokens._DIGITS) ** 43 >= 2**256


def test_hashes() -> None:
    assert hash_token("tt_x") == hashlib.sha256(b"tt_x").hexdigest()
    assert len(hash_token("\ud800")) == 64  # whatever comes over the link, it has a hash
    assert is_hash_equal(hash_token("a"), hash_token("a"))
    assert not is_hash_equal(hash_token("a"), hash_token("b"))


@pytest.fixture(scope="module")
def private() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _private_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


@pytest.fixture
def public(private: rsa.RSAPrivateKey, tmp_path: Path) -> Path:
    path = tmp_path / "jwt.pem"
    path.write_bytes(_public_pem(private))
    return path


def claims(**changes: object) -> dict[str, Any]:
    all_claims = {"account_id": "acme-abc234", "agent_id": "agent-1", "exp": NOW + 60, **changes}
    return {name: value for name, value in all_claims.items() if value is not None}


def sign(key: str = SECRET, alg: str = "HS256", **changes: object) -> str:
    return jwt.encode({"alg": alg}, claims(**changes), OctKey.import_key(key), algorithms=[alg])


def verifier(secret: str = SECRET, public_key: str = "") -> JwtVerifier:
    return JwtVerifier(secret, public_key, lambda: NOW)


def test_hs256() -> None:
    found = verifier().verify(sign(), "agent-1")
    assert (found.account_id, found.agent_id, found.expires_at) == ("acme-abc234", "agent-1", NOW + 60)
    ahead = verifier().verify(sign(iat=NOW + LEEWAY, nbf=NOW + LEEWAY), "")  # the issuer's clock is a little ahead
    assert ahead.agent_id == "agent-1"
    assert verifier().verify(sign(), "").agent_id == "agent-1"


def test_rs256(private: rsa.RSAPrivateKey, public: Path) -> None:
    token = jwt.encode({"alg": "RS256"}, claims(), RSAKey.import_key(_private_pem(private)))
    assert verifier("", str(public)).verify(token, "agent-1").account_id == "acme-abc234"
    assert verifier(SECRET, str(public)).verify(token, "agent-1").account_id == "acme-abc234"
    assert verifier(SECRET, str(public)).verify(sign(), "agent-1").account_id == "acme-abc234"


def _unsigned(header: str, signature: str = "") -> str:
    import base64
    import json

    def part(text: str) -> str:
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    return f"{part(header)}.{part(json.dumps(claims()))}.{signature}"


def _confused(public: Path) -> str:
    """The public key's PEM used as an HS256 secret: the classic forgery."""
    import base64
    import hashlib
    import hmac

    body = _unsigned('{"alg":"HS256"}').rstrip(".")
    signature = hmac.new(public.read_bytes(), body.encode(), hashlib.sha256).digest()
    return f"{body}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (lambda: sign(exp=NOW - 1), "expired"),
        (lambda: sign(exp=NOW), "expired"),
        (lambda: sign(exp=None), "bad_token"),
        (lambda: sign(exp="soon"), "bad_token"),
        (lambda: sign(exp=True), "bad_token"),
        (lambda: sign(exp=float("inf")), "bad_token"),
        (lambda: sign(exp=float("nan")), "bad_token"),
        (lambda: sign(nbf=NOW + LEEWAY + 1), "bad_token"),
        (lambda: sign(iat=NOW + LEEWAY + 1), "bad_token"),
        (lambda: sign(nbf="now"), "bad_token"),
        (lambda: sign(account_id=None), "bad_token"),
        (lambda: sign(account_id=7), "bad_token"),
        (lambda: sign(account_id=""), "bad_token"),
        (lambda: sign(agent_id=None), "bad_token"),
        (lambda: sign(agent_id="agent-2"), "bad_token"),
        (lambda: sign(key="another secret of at least 32 bytes!"), "bad_token"),
        (lambda: sign(alg="HS512"), "bad_token"),
        (lambda: sign()[:-2], "bad_token"),
        (lambda: sign().rpartition(".")[0] + ".", "bad_token"),
        (lambda: _unsigned('{"alg":"none"}'), "bad_token"),
        (lambda: _unsigned('{"alg":"HS256"}'), "bad_token"),
        (lambda: _unsigned('{"alg":["HS256"]}'), "bad_token"),
        (lambda: _unsigned('{"alg":{}}'), "bad_token"),
        (lambda: _unsigned("[" * 3000), "bad_token"),
        (lambda: _unsigned("{}"), "bad_token"),
        (lambda: "not a token", "bad_token"),
        (lambda: "..", "bad_token"),
        (lambda: "\u2028.\ud800.x", "bad_token"),
    ],
)
def test_bad_jwts_are_refused(token: Callable[[], str], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        verifier().verify(token(), "agent-1")
    assert caught.value.reason == reason
    assert SECRET not in str(caught.value)


def test_a_public_key_is_no_secret(public: Path) -> None:
    for either in (verifier("", str(public)), verifier(SECRET, str(public))):
        with pytest.raises(Refused) as caught:
            either.verify(_confused(public), "agent-1")
        assert caught.value.reason == "bad_token"


def test_unusable_keys(tmp_path: Path, private: rsa.RSAPrivateKey, public: Path) -> None:
    files = {
        "private": _private_pem(private),
        "curve": _public_pem(ec.generate_private_key(ec.SECP256R1())),
        "small": _public_pem(rsa.generate_private_key(65537, 1024)),
        "broken": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "text": b"hello",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for secret, path, words in [
        ("short", "", "at least 32 bytes"),
        (public.read_text(), "", "is a PEM file"),
        ("", "nowhere", "-jwt-public-key: .*nowhere does not exist"),
        ("", "private", "is a private key"),
        ("", "curve", "not an RSA public key"),
        ("", "small", "has 1024 bits"),
        ("", "broken", "not an RSA public key"),
        ("", "text", "is not a PEM file"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            verifier(secret, str(tmp_path / path) if path else "")
        assert "\n" not in str(caught.value)
