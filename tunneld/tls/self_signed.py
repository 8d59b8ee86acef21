"""Self-signed certificates for relays without a certificate authority; clients know them by their pin."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tunneld.tls.pins import fingerprint

LIFE = timedelta(days=3650)
"""Validity. A pin ignores it; a client that uses the certificate as its own authority has ten years."""
CLOCK_SKEW = timedelta(days=1)
"""How far a client's clock may be behind."""
MAX_COMMON_NAME = 64
"""Characters (RFC 5280). A longer host is in the subject alternative name only, which is where clients look."""


@dataclass(frozen=True, slots=True)
class SelfSigned:
    """A certificate and its private key, both in PEM, and the certificate's pin."""

    certificate: bytes
    key: bytes
    pin: str


def make_self_signed(host: str, now: datetime | None = None) -> SelfSigned:
    """Create a private key (ECDSA P-256) and a self-signed certificate for a host name or an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(host, key, now or datetime.now(UTC))
    return SelfSigned(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        fingerprint(certificate.public_bytes(serialization.Encoding.DER)),
    )


def _certificate(host: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host if len(host) <= MAX_COMMON_NAME else "tunneld")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
