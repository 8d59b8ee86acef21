"""Pinned certificates: a relay is known by the fingerprint of its certificate, without an authority, as SSH knows
hosts.

    sha256:9f86d0...        SHA-256 of the certificate in DER, which `openssl x509 -fingerprint -sha256` prints

The check is part of the handshake and belongs to the context. Every connection made with it, the hundredth reconnect
like the first, is compared before it can be used, and in TLS 1.3 before our own certificate or the last handshake
message is sent. A pin ignores the names and dates in a certificate; if an authority is given too, both are checked.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from pathlib import Path

from tunneld.errors import ConfigError, RemoteProtocolError, UsageError, reason_of

SUBJECT = "subject:"
"""Prefix of a certificate's subject, where a configuration accepts a subject or a fingerprint."""
_PIN = re.compile(r"sha256:[0-9a-f]{64}")


def parse_pin(text: str) -> str:
    """Normalize one pin: `sha256:` and 64 hexadecimal digits. Capitals, and colons as OpenSSL prints them, are
    accepted. Raises `UsageError`.
    """
    kind, _, digest = text.partition(":")
    pin = f"{kind.lower()}:{digest.replace(':', '').lower()}"
    if not _PIN.fullmatch(pin):
        raise UsageError(f"not a fingerprint of the form sha256: and 64 hexadecimal digits: {text!r}")
    return pin


def parse_pins(text: str) -> str:
    """Normalize one or more pins separated by commas: of the relay's current certificate and of its next one. Raises
    `UsageError`.
    """
    return ",".join(map(parse_pin, text.split(",")))


def fingerprint(certificate: bytes) -> str:
    """The pin of a certificate in DER."""
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


def parse_subject(text: str) -> str:
    """Normalize `subject:` and a distinguished name as in RFC 4514 (`CN=alice,O=Example`). Raises `UsageError`."""
    from cryptography import x509  # noqa: PLC0415  # slow to import, and few configurations need it

    try:
        name = x509.Name.from_rfc4514_string(text.removeprefix(SUBJECT))
    except ValueError as error:
        raise UsageError(f"not a distinguished name such as subject:CN=alice: {text!r} ({error})") from None
    if not name.rdns:
        raise UsageError("not a distinguished name such as subject:CN=alice: it is empty")
    return SUBJECT + name.rfc4514_string()


def subject(certificate: bytes) -> str:
    """The subject of a certificate in DER, normalized as by `parse_subject`; empty if it cannot be parsed."""
    from cryptography import x509  # noqa: PLC0415  # see above

    try:
        return SUBJECT + x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
    except ValueError:
        return ""


def first_fingerprint(pem: Path) -> str:
    """The pin of a relay that shows this file: the fingerprint of its first certificate. Raises `ConfigError`."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    try:
        body = pem.read_text(encoding="ascii", errors="replace").partition(begin)[2].partition(end)[0]
        return fingerprint(ssl.PEM_cert_to_DER_cert(f"{begin}{body}{end}"))
    except OSError as error:
        raise ConfigError([f"{pem}: cannot read the certificate: {reason_of(error)}"]) from None
    except ValueError:
        raise ConfigError([f"{pem}: not a PEM certificate"]) from None


class PinnedContext(ssl.SSLContext):
    """A client's context whose handshakes fail unless the peer shows a pinned certificate. It works through `wrap_bio`,
    which Trio uses, and through `wrap_socket`.
    """

    pin: str = ""

    @classmethod
    def make(cls, pin: str) -> PinnedContext:
        """A context for one or more pins, separated by commas. It trusts no authority until one is loaded. Raises
        `UsageError`.
        """
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.pin = parse_pins(pin)
        context.sslobject_class = _PinnedObject
        context.sslsocket_class = _PinnedSocket
        return context


class _PinnedObject(ssl.SSLObject):
    """Checks the pin at the end of the handshake, for `wrap_bio`."""

    def do_handshake(self) -> None:
        super().do_handshake()
        _check_pin(self)


class _PinnedSocket(ssl.SSLSocket):
    """The same for `wrap_socket`."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_pin(self)


def _check_pin(connection: ssl.SSLObject | ssl.SSLSocket) -> None:
    pin = connection.context.pin if isinstance(connection.context, PinnedContext) else ""
    shown = fingerprint(connection.getpeercert(binary_form=True) or b"")
    if shown not in pin.split(","):
        raise RemoteProtocolError(
            f"certificate of relay {connection.server_hostname} does not match --pin: it is {shown}, not {pin}; the "
            "relay has a new certificate, or the connection is being intercepted: ask its operator before you change "
            "the pin"
        )
