"""What is wrong with a certificate or key, in words: each slip that people make, and that loading it does fail."""

from __future__ import annotations

import datetime
import ssl
import subprocess
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import pkcs12

from tunnel.config import load_core
from tunnel.core.certificates import Pair, read_pair
from tunnel.core.issuing.making import place_for
from tunnel.errors import ConfigError
from tunnel.trust import explain_authorities, explain_pair, explain_reading, explain_refusal

CA = trustme.CA()
ISSUED, OTHER = CA.issue_cert("a.example"), CA.issue_cert("b.example")
CERT, KEY = ISSUED.cert_chain_pems[0].bytes(), ISSUED.private_key_pem.bytes()
LEAF, PRIVATE = x509.load_pem_x509_certificate(CERT), serialization.load_pem_private_key(KEY, None)
ENCODING, FORMAT = serialization.Encoding, serialization.PrivateFormat


def encrypted(form: serialization.PrivateFormat) -> bytes:
    password = serialization.BestAvailableEncryption(b"secret")
    return PRIVATE.private_bytes(ENCODING.PEM, form, password)


def der(form: serialization.PrivateFormat = FORMAT.PKCS8) -> bytes:
    return PRIVATE.private_bytes(ENCODING.DER, form, serialization.NoEncryption())


def bundle() -> bytes:
    return pkcs12.serialize_key_and_certificates(b"", PRIVATE, LEAF, None, serialization.NoEncryption())  # type: ignore[arg-type]


def request() -> bytes:
    return b"-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----\n"


PUBLIC = PRIVATE.public_key().public_bytes(ENCODING.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

WRONG: list[tuple[bytes | None, bytes | None, str]] = [
    (None, KEY, "{cert} does not exist"),
    (CERT, None, "{key} does not exist"),
    (b" \n", KEY, "{cert} is empty"),
    (CERT, b"", "{key} is empty"),
    (b"no certificate\n", KEY, "{cert} is not PEM: it has no line -----BEGIN CERTIFICATE-----"),
    (CERT, b"no key\n", "{key} is not PEM: it has no line -----BEGIN PRIVATE KEY-----"),
    (LEAF.public_bytes(ENCODING.DER), KEY,
     "{cert} is not PEM but DER; convert it: openssl x509 -in {cert} -out {cert}.pem"),
    (CERT, der(), "{key} is not PEM but DER; convert it: openssl pkey -in {key} -out {key}.pem"),
    (bundle(), KEY,
     "{cert} is not PEM; if it is PKCS #12, convert it: openssl pkcs12 -in {cert} -nodes -out {cert}.pem"),
    (KEY, CERT, "{cert} holds a private key, not a certificate; are certificate and key swapped?"),
    (CERT, CERT, "{key} holds a certificate, not a private key; are certificate and key swapped?"),
    (CERT, PUBLIC, "{key} holds a public key, not a private key; are certificate and key swapped?"),
    (request(), KEY, "{cert} holds a certificate request, not a certificate: give what the authority made of it"),
    (CERT[:300], KEY, "{cert}: the certificate is damaged or cut off; copy the file again"),
    (CERT + CERT[:300], KEY, "{cert}: certificate 2 of 2 is damaged or cut off; copy the file again"),
    (CERT, KEY[:100], "{key}: the private key is damaged or cut off; copy the file again"),
    (CERT.rstrip() + CERT, KEY,
     "{cert}: two files were joined without a line break; each -----BEGIN line must stand alone"),
    (CERT, OTHER.private_key_pem.bytes(),
     "{key} is not the key of the certificate in {cert}; give the key that it was asked for with"),
    (CA.cert_pem.bytes() + CERT, KEY, "{cert}: the certificate of {key} must come first in it, and is number 2"),
    *[(CERT, encrypted(form), "{key} is encrypted, and nobody is there to type its passphrase; decrypt it: "
       "(umask 077; openssl pkey -in {key} -out {key}.plain)") for form in (FORMAT.PKCS8, FORMAT.TraditionalOpenSSL)],
]  # fmt: skip


@pytest.mark.parametrize(("cert", "key", "said"), WRONG, ids=[said[:50] for _, _, said in WRONG])
def test_a_pair_that_is_of_no_use(cert: bytes | None, key: bytes | None, said: str, tmp_path: Path) -> None:
    pair = write(tmp_path, cert, key)
    with pytest.raises(ValueError) as caught:
        read_pair(pair)
    assert str(caught.value) == said.format(cert=pair.cert, key=pair.key)


def write(tmp_path: Path, cert: bytes | None, key: bytes | None) -> Pair:
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    for path, data in ((pair.cert, cert), (pair.key, key)):
        if data is not None:
            path.write_bytes(data)
    return pair


def test_a_pair_in_one_file_in_any_order(tmp_path: Path) -> None:
    for data in (CERT + KEY, KEY + CERT):
        read_pair(write(tmp_path, data, data))


def test_the_advice_on_der_works(tmp_path: Path) -> None:
    pair = write(tmp_path, LEAF.public_bytes(ENCODING.DER), KEY)
    follow_advice(pair)
    read_pair(Pair(tmp_path / "cert.pem.pem", pair.key))
    pair = write(tmp_path, CERT, der())
    follow_advice(pair)
    read_pair(Pair(pair.cert, tmp_path / "key.pem.pem"))


def test_the_advice_on_pkcs12_works(tmp_path: Path) -> None:
    pair = write(tmp_path, bundle(), KEY)
    both = pair.cert.with_name("cert.pem.pem")
    follow_advice(pair, " -passin pass:")
    read_pair(Pair(both, both))


def follow_advice(pair: Pair, more: str = "") -> None:
    with pytest.raises(ValueError) as caught:
        read_pair(pair)
    command = str(caught.value).partition("convert it: ")[2] + more
    subprocess.run(command, shell=True, check=True, capture_output=True)


def test_a_key_that_is_too_short(tmp_path: Path) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    signed = _self_signed(weak)
    key = weak.private_bytes(ENCODING.PEM, FORMAT.PKCS8, serialization.NoEncryption())
    with pytest.raises(ValueError, match="its key is too short for today; make a new one"):
        read_pair(write(tmp_path, signed, key))


def _self_signed(key: rsa.RSAPrivateKey) -> bytes:
    name, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    return made.sign(key, SHA256()).public_bytes(ENCODING.PEM)


def test_what_openssl_says_where_nothing_is_known(tmp_path: Path) -> None:
    pair = write(tmp_path, CERT, KEY)
    said = explain_pair(pair.cert, pair.key, ValueError("ODD_THING"))
    assert said == f"{pair.cert}: OpenSSL does not take it (ODD_THING)"


@pytest.mark.parametrize("data", [b"", b"no PEM", KEY, CERT[:300]])
def test_authorities_that_are_of_no_use(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(data)
    with pytest.raises((OSError, ssl.SSLError)) as caught:
        ssl.create_default_context(cafile=str(path))
    assert str(path) in (said := explain_authorities(path, caught.value)) and "OpenSSL" not in said


def test_what_can_not_be_read(tmp_path: Path) -> None:
    assert explain_reading(tmp_path, IsADirectoryError()) == f"{tmp_path} is a directory, and a file is wanted"
    said = explain_reading(tmp_path, PermissionError())
    assert said.startswith(f"{tmp_path} can't be read: ") and "owner or group" in said


# A peer's -----------------------------------------------------------------------------------------------------------


def refusal(server: ssl.SSLContext, authorities: bytes, host: str = "a.example") -> ssl.SSLCertVerificationError:
    """What a client that trusts these says of the certificate that it is shown."""
    client = ssl.create_default_context(cadata=authorities.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(down, up, server_hostname=host)
    there = server.wrap_bio(up, down, server_side=True)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        for _ in range(4):
            for end in (here, there):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    pass
    return caught.value


def presents(issued: trustme.LeafCert, alone: bool = False) -> ssl.SSLContext:
    """alone: without the certificates between it and the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with trustme.Blob(issued.private_key_pem.bytes() + b"".join(
        pem.bytes() for pem in issued.cert_chain_pems[: 1 if alone else None])).tempfile() as path:  # fmt: skip
        context.load_cert_chain(path)
    return context


def year(number: int) -> dict[str, datetime.datetime]:
    return {"not_before": datetime.datetime(number, 1, 1), "not_after": datetime.datetime(number + 1, 1, 1)}


TRUSTED = CA.cert_pem.bytes()
UNKNOWN = "or it came without the certificates between"


@pytest.mark.parametrize(
    ("server", "host", "said"),
    [
        (presents(OTHER), "a.example", "it is not for a.example, the name that it was reached by"),
        (presents(OTHER), "127.0.0.1", "it is not for 127.0.0.1, the name that it was reached by"),
        (presents(CA.issue_cert("a.example", **year(2001))), "a.example",
         "it has expired, or the clock of this machine is wrong"),
        (presents(CA.issue_cert("a.example", **year(9001))), "a.example",
         "it is not valid yet, or the clock of this machine is wrong"),
        (presents(trustme.CA().issue_cert("a.example")), "a.example",
         f"the authority that signed it is none in ca.pem, {UNKNOWN}"),
        (presents(CA.create_child_ca().issue_cert("a.example"), alone=True), "a.example",
         f"the authority that signed it is none in ca.pem, {UNKNOWN}"),
    ],
)  # fmt: skip
def test_a_certificate_that_is_not_accepted(server: ssl.SSLContext, host: str, said: str) -> None:
    assert explain_refusal(refusal(server, TRUSTED, host), host, "ca.pem") == said


def test_one_that_signed_itself(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pair = write(
        tmp_path, _self_signed(key), key.private_bytes(ENCODING.PEM, FORMAT.PKCS8, serialization.NoEncryption())
    )
    assert explain_refusal(refusal(read_pair(pair).context, TRUSTED), "a.example") == "it is self-signed"
    authority = trustme.CA()
    issued = authority.issue_cert("a.example")
    chain = b"".join(pem.bytes() for pem in [*issued.cert_chain_pems, authority.cert_pem])
    pair = write(tmp_path, chain, issued.private_key_pem.bytes())
    said = explain_refusal(refusal(read_pair(pair).context, TRUSTED), "a.example")
    assert said == "the authority that signed it is not known to this machine"


def test_other_trouble_is_none_of_the_certificate() -> None:
    assert explain_refusal(ssl.SSLEOFError(8, "EOF"), "a.example") == ""
    assert explain_refusal(ConnectionResetError(), "a.example") == ""


def test_authorities_of_the_one_that_certificates_come_from(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(KEY)
    acme = ["-acme-agree", "-public-tls", "-http-addr=:0", f"-acme-ca-cert={tmp_path / 'ca.pem'}"]
    with pytest.raises(ConfigError, match=r"^-acme-ca-cert: .*ca.pem holds a private key; give the certificate of"):
        place_for(load_core(acme, {}), tmp_path)
