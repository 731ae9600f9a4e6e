"""What agents prove themselves with: an account's random token, or a JWT signed with a configured key.

A random token has 256 bits, so one round of SHA-256 is enough to store it: there is nothing to guess, and a stolen
store gives no token away. A JWT is checked by the algorithm that its key was configured for, never by the one that
its header asks for alone: HS256 meets only the secret, RS256 only the public key, so a public key can't be passed off
as a secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunnel.errors import ConfigError, Refused
from tunnel.trust import explain_reading

PREFIX = "tt_"
#: characters of a token that are kept and shown: enough to tell tokens apart, 36 of 256 bits
SHOWN = 9
#: longer ones are refused unread (RS256 with ample claims needs about 1 KiB)
MAX_LENGTH = 8192
#: bytes an HS256 secret must have (RFC 7518 section 3.2)
MIN_SECRET = 32
#: bits an RS256 key must have (RFC 7518 section 3.3)
MIN_RSA_BITS = 2048
#: seconds that the clock of who signs JWTs may be ahead of ours (nbf, iat)
LEEWAY = 60
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_LENGTH = math.ceil(256 / math.log2(len(_DIGITS)))


@dataclass(frozen=True, slots=True)
class Grant:
    """Who an agent has proved to be. token_id: "" for a JWT. expires_at: seconds since 1970, None for never."""

    account_id: str
    account: str
    agent_id: str
    token_id: str = ""
    expires_at: float | None = None


def make_token() -> str:
    """A new token: "tt_" and 256 random bits in letters and digits (a double click selects it whole)."""
    number = int.from_bytes(secrets.token_bytes(32), "big")
    digits = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return PREFIX + "".join(digits)


def hash_token(token: str) -> str:
    """SHA-256, lower-case hex: what the store keeps."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def is_hash_equal(one: str, other: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


@dataclass(frozen=True, slots=True)
class Claims:
    account_id: str
    agent_id: str
    expires_at: float


class JwtVerifier:
    """secret: for HS256. public_key: path of a PEM file, for RS256. Either may be "".

    Raises ConfigError for a weak or unusable key. joserfc is imported here: most cores use no JWT.
    """

    def __init__(self, secret: str, public_key: str, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._keys: dict[str, Any] = {}
        if secret:
            self._keys["HS256"] = _secret_key(secret)
        if public_key:
            self._keys["RS256"] = _public_key(Path(public_key))

    def verify(self, token: str, agent_id: str) -> Claims:
        """The claims of a good token. Raises Refused: bad_token or expired.

        agent_id: as the agent states it ("" if it doesn't); it must be the token's.
        """
        from joserfc import errors, jwt

        algorithm = _stated_algorithm(token)
        key = self._keys.get(algorithm)
        if key is None:
            raise Refused("bad_token", "the JWT is not signed with an algorithm that this server is configured for")
        try:
            claims = jwt.decode(token, key, algorithms=[algorithm]).claims
            now = self._wall()
            jwt.JWTClaimsRegistry(now=int(now), leeway=LEEWAY, exp={"essential": True}).validate(claims)
        except errors.ExpiredTokenError:
            raise Refused("expired", "the JWT has expired") from None
        except (errors.JoseError, ValueError, TypeError, RecursionError):
            raise Refused("bad_token", "the JWT is not valid, or not signed with this server's key") from None
        account, agent, expires_at = claims.get("account_id"), claims.get("agent_id"), claims["exp"]
        if not (isinstance(account, str) and account and isinstance(agent, str) and agent):
            raise Refused("bad_token", "the JWT lacks the claim account_id or agent_id")
        if isinstance(expires_at, bool) or not math.isfinite(expires_at):
            raise Refused("bad_token", "the JWT's claim exp is not a time")
        if expires_at <= now:
            raise Refused("expired", "the JWT has expired")
        if agent_id and agent_id != agent:
            raise Refused("bad_token", "the JWT is for another agent")
        return Claims(account, agent, float(expires_at))


def _stated_algorithm(token: str) -> str:
    """The header's "alg". It only chooses among our keys; the signature is then checked with that key's algorithm."""
    import json

    head = token.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
        return str(header["alg"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused("bad_token", "the token is neither one of this server's nor a JWT") from None


def _secret_key(secret: str) -> Any:
    from joserfc.jwk import OctKey

    if len(secret.encode()) < MIN_SECRET:
        raise ConfigError(f"-jwt-secret is too short: HS256 needs at least {MIN_SECRET} bytes")
    if "-----BEGIN" in secret:
        raise ConfigError("-jwt-secret is a PEM file; a public key belongs in -jwt-public-key")
    return OctKey.import_key(secret.encode())


def _public_key(path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from joserfc.jwk import RSAKey

    try:
        pem = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"-jwt-public-key: {explain_reading(path, exc)}") from None
    if b"PRIVATE KEY" in pem:
        raise ConfigError(
            f"-jwt-public-key: {path} is a private key; give its public half: openssl pkey -in {path} -pubout"
        )
    if b"-----BEGIN" not in pem:
        raise ConfigError(f"-jwt-public-key: {path} is not a PEM file: it has no line -----BEGIN PUBLIC KEY-----")
    try:
        key: object = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, RSAPublicKey):
        raise ConfigError(f"-jwt-public-key: {path} is not an RSA public key")
    if key.key_size < MIN_RSA_BITS:
        raise ConfigError(f"-jwt-public-key: {path} has {key.key_size} bits; RS256 needs at least {MIN_RSA_BITS}")
    return RSAKey.import_key(pem)
