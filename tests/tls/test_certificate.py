"""One certificate of a relay: its names and dates, and whether clients accept it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tunneld.config.certificates import TlsFiles
from tunneld.errors import ConfigError
from tunneld.tls.certificate import WARN_FRACTION, ServerCertificate
from tunneld.tls.self_signed import LIFE, make_self_signed

NOW = datetime.now(UTC)


def read(folder: Path, made: datetime, host: str = "relay.example.org") -> ServerCertificate:
    made_certificate = make_self_signed(host, made)
    (folder / "relay.pem").write_bytes(made_certificate.certificate)
    (folder / "relay.key").write_bytes(made_certificate.key)
    return ServerCertificate.read(TlsFiles(certificate=folder / "relay.pem", key=folder / "relay.key"))[0]


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (NOW, ""),
        (NOW - LIFE + timedelta(days=15), ""),
        (NOW - LIFE + timedelta(days=13, hours=1), "expires in 13 days"),
        (NOW - LIFE + timedelta(hours=1), "expires in 0 days"),
        (NOW - LIFE - timedelta(hours=1), "has expired"),
        (NOW + timedelta(days=2), "is not valid yet: check this machine's clock"),
    ],
)
def test_a_certificate_that_clients_reject_is_a_problem(tmp_path: Path, made: datetime, problem: str) -> None:
    certificate = read(tmp_path, made)
    expected = f"certificate {tmp_path / 'relay.pem'} {problem}" if problem else ""
    assert certificate.problem(NOW.timestamp()) == expected
    assert certificate.is_valid(NOW.timestamp()) == (not problem or "expires in" in problem)
    assert certificate.names == ("relay.example.org",)


def test_a_short_lived_certificate_is_a_problem_in_its_last_quarter(tmp_path: Path) -> None:
    begin, end = NOW - timedelta(days=1), NOW + timedelta(days=5)
    issued = trustme.CA().issue_cert("localhost", not_before=begin, not_after=end).private_key_and_cert_chain_pem
    both = tmp_path / "both.pem"
    issued.write_to_path(both)
    certificate, _context = ServerCertificate.read(TlsFiles(certificate=both, key=both))
    edge = end.timestamp() - WARN_FRACTION * (end - begin).total_seconds()
    assert not certificate.problem(edge - 2)
    assert certificate.problem(edge + 2) == f"certificate {both} expires in 1 day"


def test_the_names_are_known_even_if_clients_must_show_a_certificate(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    both = tmp_path / "both.pem"
    ca.issue_cert("*.T.example.org", "t.example.org", "192.0.2.1").private_key_and_cert_chain_pem.write_to_path(both)
    certificate, _context = ServerCertificate.read(TlsFiles(certificate=both, key=both, client_ca=tmp_path / "ca.pem"))
    assert certificate.names == ("*.t.example.org", "t.example.org")


def test_a_certificate_for_another_purpose_is_a_problem(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mail")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=90))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=True)
        .sign(key, hashes.SHA256())
    )
    both = tmp_path / "both.pem"
    no_encryption = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    both.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_encryption))
    certificate, _context = ServerCertificate.read(TlsFiles(certificate=both, key=both))
    assert "is rejected by clients that verify it: " in certificate.problem(NOW.timestamp())
    assert not certificate.names


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    read(tmp_path, NOW)
    (tmp_path / "relay.key").write_bytes(make_self_signed("relay.example.org").key)
    with pytest.raises(ConfigError, match=r"^http\.tls: key .*relay\.key does not belong to certificate .*relay\.pem$"):
        ServerCertificate.read(TlsFiles(certificate=tmp_path / "relay.pem", key=tmp_path / "relay.key"), "http.tls")
