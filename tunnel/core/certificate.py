"""The certificate of a core that was given none: self-signed, kept in the data directory, pinned by its fingerprint.

Visitors get another one of that kind until the core has got certificates for them (tunnel/core/issuing).
"""

from __future__ import annotations

import datetime
from pathlib import Path

from tunnel.core.private import write_secret
from tunnel.errors import ConfigError

YEARS = 20


def ensure_certificate(data_dir: Path, name: str = "agent-link") -> tuple[Path, Path]:
    """(certificate, key), made on the first start. Raises ConfigError."""
    cert, key = data_dir / f"{name}.crt", data_dir / f"{name}.key"
    try:
        if not (cert.exists() and key.exists()):
            _make(cert, key)
    except OSError as exc:
        raise ConfigError(f"can't keep a certificate in {data_dir} ({exc.strerror}); give another -data-dir") from exc
    return cert, key


def _make(cert: Path, key: Path) -> None:
    from cryptography import x509  # a tenth of a second, and only at the first start
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tunnel core")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(private, hashes.SHA256())
    )
    write_secret(
        key,
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )
    write_secret(cert, made.public_bytes(serialization.Encoding.PEM).decode())
