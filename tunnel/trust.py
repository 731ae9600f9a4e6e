"""Why a certificate or key is of no use, in plain words: which file, what is wrong with it, what to do.

OpenSSL says "PEM lib" of most of what can be wrong with a file. So whoever could not load one asks here, and the files
are looked at again, in this order: (1) it can't be read; (2) it is no PEM; (3) it holds something else; (4) what it
holds is damaged; (5) certificate and key don't belong together; (6) OpenSSL does not want them, too weak for one.

`explain_refusal` is about the other side: why a peer's certificate was not accepted, in a handshake.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CERTIFICATE, KEY, AUTHORITY = "a certificate", "a private key", "a certificate of an authority"

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
_MAX = 4 * 1024 * 1024  # bytes of a file that are looked at; the usual bundle of authorities has 0.2 MB

#: what OpenSSL refuses in good files
_TOO_WEAK = {
    "EE_KEY_TOO_SMALL": "its key is too short for today; make a new one, of 2048 bits or more for RSA",
    "CA_KEY_TOO_SMALL": "a key in its chain is too short for today; get a new certificate",
    "CA_MD_TOO_WEAK": "it is signed with an outdated algorithm; get a new certificate",
}

#: X509_V_ERR_… (openssl/x509_vfy.h)
NOT_YET, EXPIRED, _SELF_SIGNED, _SELF_SIGNED_ROOT, _NO_ISSUER, _NO_ISSUER_OF_LEAF = 9, 10, 18, 19, 20, 21
WRONG_NAME, WRONG_ADDRESS = 62, 64


def explain_pair(cert: Path, key: Path, exc: Exception) -> str:
    """Why a certificate chain and its key can't be used; exc: what loading them raised."""
    text = _explain_file(cert, CERTIFICATE) or _explain_file(key, KEY) or _explain_match(cert, key)
    if text:
        return text
    reason = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or str(exc)
    return f"{cert}: {_TOO_WEAK.get(reason) or f'OpenSSL does not take it ({reason})'}"


def explain_reading(path: Path, exc: OSError) -> str:
    """Why a file or directory can't be read."""
    if isinstance(exc, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(exc, PermissionError):
        return f"{path} can't be read: {_user()} may not; change its owner or group, or those of the directory above"
    if isinstance(exc, IsADirectoryError):
        return f"{path} is a directory, and a file is wanted"
    if isinstance(exc, NotADirectoryError):
        return f"{path} is a file, and a directory is wanted"
    return f"{path} can't be read: {exc.strerror or type(exc).__name__}"


def explain_authorities(path: Path, exc: Exception) -> str:
    """Why a file of authorities' certificates can't be used."""
    return _explain_file(path, AUTHORITY) or f"{path}: OpenSSL does not take it ({exc})"


def explain_refusal(exc: BaseException, host: str, authorities: str = "") -> str:
    """Why the certificate of a peer was not accepted; "" where it was something else. It goes on after "it".

    host: that it should be for. authorities: the file that they were read from, "" for those of this machine.
    """
    if not isinstance(exc, ssl.SSLCertVerificationError):
        return ""
    code = exc.verify_code
    if code in (WRONG_NAME, WRONG_ADDRESS):
        return f"it is not for {host}, the name that it was reached by"
    if code == EXPIRED:
        return "it has expired, or the clock of this machine is wrong"
    if code == NOT_YET:
        return "it is not valid yet, or the clock of this machine is wrong"
    if code in (_NO_ISSUER, _NO_ISSUER_OF_LEAF):
        known = f"none in {authorities}" if authorities else "none that this machine knows"
        return f"the authority that signed it is {known}, or it came without the certificates between"
    if code in (_SELF_SIGNED, _SELF_SIGNED_ROOT):
        known = f"not in {authorities}" if authorities else "not known to this machine"
        return "it is self-signed" if code == _SELF_SIGNED else f"the authority that signed it is {known}"
    return exc.verify_message


# Files --------------------------------------------------------------------------------------------------------------


def _explain_file(path: Path, wanted: str) -> str:
    """Cases 1 to 4; "" for a file that holds what it should."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX)
    except OSError as exc:
        return explain_reading(path, exc)
    if not data.strip():
        return f"{path} is empty"
    if b"----------BEGIN " in data:
        return f"{path}: two files were joined without a line break; each -----BEGIN line must stand alone"
    blocks = [(match[1].decode(), match[0]) for match in _BLOCK.finditer(data)]
    if not blocks:
        return f"{path} {_explain_binary(data, wanted, path)}"
    kinds = [kind for kind, _ in blocks]
    if wanted != KEY:
        found = [block for kind, block in blocks if kind.endswith("CERTIFICATE")]
        return _explain_certificates(path, wanted, kinds, found)
    return _explain_key(path, kinds, next((block for kind, block in blocks if kind.endswith("PRIVATE KEY")), b""))


def _user() -> str:
    try:
        import pwd

        return f"the user {pwd.getpwuid(os.geteuid()).pw_name}"
    except (ImportError, KeyError):
        return "this program's user"


def _explain_binary(data: bytes, wanted: str, path: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    word = "PRIVATE KEY" if wanted == KEY else "CERTIFICATE"
    for what, load, command in (
        ("CERTIFICATE", lambda: x509.load_der_x509_certificate(data), f"openssl x509 -in {path} -out {path}.pem"),
        ("PRIVATE KEY", lambda: load_der_private_key(data, None), f"openssl pkey -in {path} -out {path}.pem"),
    ):
        if word == what and _works(load):
            return f"is not PEM but DER; convert it: {command}"
    if data[:1] == b"\x30" and not data.isascii():
        return f"is not PEM; if it is PKCS #12, convert it: openssl pkcs12 -in {path} -nodes -out {path}.pem"
    return f"is not PEM: it has no line -----BEGIN {word}-----"


def _explain_certificates(path: Path, wanted: str, kinds: list[str], blocks: list[bytes]) -> str:
    from cryptography import x509

    if not blocks and wanted == AUTHORITY:
        return f"{path} holds {_what(kinds)}; give the certificate of the authority that signs"
    if not blocks:
        if "CERTIFICATE REQUEST" in kinds or "NEW CERTIFICATE REQUEST" in kinds:
            return f"{path} holds a certificate request, not a certificate: give what the authority made of it"
        return f"{path} holds {_what(kinds)}, not a certificate; are certificate and key swapped?"
    for number, block in enumerate(blocks, 1):
        if not _works(lambda block=block: x509.load_pem_x509_certificate(block)):
            which = "the certificate" if len(blocks) == 1 else f"certificate {number} of {len(blocks)}"
            return f"{path}: {which} is damaged or cut off; copy the file again"
    return ""


def _explain_key(path: Path, kinds: list[str], block: bytes) -> str:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not block:
        return f"{path} holds {_what(kinds)}, not a private key; are certificate and key swapped?"
    if b"ENCRYPTED" in block:
        return (
            f"{path} is encrypted, and nobody is there to type its passphrase; decrypt it: "
            f"(umask 077; openssl pkey -in {path} -out {path}.plain)"
        )
    if not _works(lambda: load_pem_private_key(block, None)):
        return f"{path}: the private key is damaged or cut off; copy the file again"
    return ""


def _what(kinds: list[str]) -> str:
    kind = "private key" if kinds[0].endswith("PRIVATE KEY") else kinds[0].lower()
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _explain_match(cert: Path, key: Path) -> str:
    """Case 5, of two files that are good."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(_first(key, b"PRIVATE KEY"), None)
        chain: list[Certificate] = x509.load_pem_x509_certificates(cert.read_bytes())
        owners = [number for number, one in enumerate(chain, 1) if one.public_key() == private.public_key()]
    except Exception:  # what cryptography does not know OpenSSL may
        return ""
    if not owners:
        return f"{key} is not the key of the certificate in {cert}; give the key that it was asked for with"
    if owners[0] > 1:
        return f"{cert}: the certificate of {key} must come first in it, and is number {owners[0]}"
    return ""


def _first(path: Path, kind: bytes) -> bytes:
    return next(match[0] for match in _BLOCK.finditer(path.read_bytes()) if match[1].endswith(kind))


def _works(load: Any) -> bool:
    try:
        load()
    except Exception:  # each library and version has its own
        return False
    return True
