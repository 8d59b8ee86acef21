"""A relay known by the fingerprint of its certificate: TLS without an authority, as SSH knows its hosts.

    sha256:9f86d0...        SHA-256 of the certificate in DER, which `openssl x509 -fingerprint -sha256` prints

The check is a part of the handshake and belongs to the context: every connection that is made with it, the hundredth
reconnect as the first, is compared before it can be used, and in TLS 1.3 before our certificate or the last message of
the handshake is sent. Names and dates in a certificate mean nothing to a pin; where an authority is given too, it is
asked as well.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from pathlib import Path

from tunneld.errors import ConfigError, RemoteProtocolError, UsageError, reason_of

SUBJECT = "subject:"
"""How the name of a certificate's subject begins, where a fingerprint may stand, too."""
_PIN = re.compile(r"sha256:[0-9a-f]{64}")


def parse_pin(text: str) -> str:
    """`sha256:` and 64 hexadecimal digits; capitals, and colons as OpenSSL prints them, are welcome. Raises
    `UsageError`.
    """
    kind, _, digest = text.partition(":")
    pin = f"{kind.lower()}:{digest.replace(':', '').lower()}"
    if not _PIN.fullmatch(pin):
        raise UsageError(f"not a fingerprint of the form sha256: and 64 hexadecimal digits: {text!r}")
    return pin


def parse_pins(text: str) -> str:
    """One pin or more, separated by commas: of the certificate that a relay has, and of that which it will have. Raises
    `UsageError`.
    """
    return ",".join(map(parse_pin, text.split(",")))


def fingerprint(certificate: bytes) -> str:
    """The pin of a certificate in DER."""
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


def parse_subject(text: str) -> str:
    """`subject:` and a distinguished name as RFC 4514 writes it (`CN=alice,O=Example`), in its one spelling. Raises
    `UsageError`.
    """
    from cryptography import x509  # noqa: PLC0415  # slow to import, and few configurations need it

    try:
        name = x509.Name.from_rfc4514_string(text.removeprefix(SUBJECT))
    except ValueError as error:
        raise UsageError(f"not a distinguished name such as subject:CN=alice: {text!r} ({error})") from None
    if not name.rdns:
        raise UsageError("not a distinguished name such as subject:CN=alice: it is empty")
    return SUBJECT + name.rfc4514_string()


def subject(certificate: bytes) -> str:
    """The subject of a certificate in DER, as `parse_subject` gives it; empty where it has none that can be read."""
    from cryptography import x509  # noqa: PLC0415  # see above

    try:
        return SUBJECT + x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
    except ValueError:
        return ""


def first_fingerprint(pem: Path) -> str:
    """The pin of a relay that shows this file: of its first certificate. Raises `ConfigError`."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    try:
        body = pem.read_text(encoding="ascii", errors="replace").partition(begin)[2].partition(end)[0]
        return fingerprint(ssl.PEM_cert_to_DER_cert(f"{begin}{body}{end}"))
    except OSError as error:
        raise ConfigError([f"{pem}: cannot read the certificate: {reason_of(error)}"]) from None
    except ValueError:
        raise ConfigError([f"{pem}: not a PEM certificate"]) from None


class PinnedContext(ssl.SSLContext):
    """A context that shakes hands with the holder of a pinned certificate only, through `wrap_bio` (which is what Trio
    uses) and through `wrap_socket`.
    """

    pin: str = ""

    @classmethod
    def make(cls, pin: str) -> PinnedContext:
        """A client's context that trusts no authority until it is told of one. Raises `UsageError`."""
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.pin = parse_pins(pin)
        context.sslobject_class = _PinnedObject
        context.sslsocket_class = _PinnedSocket
        return context


class _PinnedObject(ssl.SSLObject):
    """The handshake ends well only when the certificate is the one."""

    def do_handshake(self) -> None:
        super().do_handshake()
        _check(self)


class _PinnedSocket(ssl.SSLSocket):
    """The same for a socket."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check(self)


def _check(connection: ssl.SSLObject | ssl.SSLSocket) -> None:
    pin = connection.context.pin if isinstance(connection.context, PinnedContext) else ""
    shown = fingerprint(connection.getpeercert(binary_form=True) or b"")
    if shown not in pin.split(","):
        raise RemoteProtocolError(
            f"relay {connection.server_hostname} shows the certificate {shown}, not the pinned {pin}: it has a new "
            "one, or somebody stands in its place; ask its operator before you change the pin"
        )
