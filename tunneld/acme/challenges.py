"""How the relay proves to a certificate authority that it answers for a name (RFC 8555 §8, RFC 8737).

    http-01        a file under /.well-known/acme-challenge/ on port 80 of the name
    tls-alpn-01    a certificate of its own kind on port 443 of the name, for ALPN `acme-tls/1`
    dns-01         a TXT record at _acme-challenge.NAME; the only one that proves a wildcard

The authority validates from several networks at once, so limits and lists of addresses never apply to challenges.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from acme import challenges
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.jwk import JWK

from tunneld.errors import UsageError

HTTP_PATH = "/.well-known/acme-challenge/"
ALPN = "acme-tls/1"
ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
"""The extension of a certificate that answers tls-alpn-01 (RFC 8737 §3)."""
DNS_HOOK_TIMEOUT = 120.0
"Seconds for one call of the hook program: DNS providers' interfaces answer in some seconds, propagation takes longer."
MAX_HOOK_OUTPUT = 500
"Characters of a failed hook's output in a message: its last lines."


@challenges.ChallengeResponse.register
class TlsAlpnResponse(challenges.KeyAuthorizationChallengeResponse):
    """The answer to `TlsAlpnChallenge`. `acme` has no tls-alpn-01 since version 4."""

    typ = "tls-alpn-01"


@challenges.Challenge.register
class TlsAlpnChallenge(challenges.KeyAuthorizationChallenge):
    """tls-alpn-01 (RFC 8737)."""

    response_cls = TlsAlpnResponse
    typ = response_cls.typ

    def validation(self, account_key: JWK, **_: Any) -> bytes:
        """The digest that the certificate must have in its extension."""
        return hashlib.sha256(self.key_authorization(account_key).encode()).digest()


class Responder(Protocol):
    """Answers one kind of challenge. The methods are called in a worker thread and may block."""

    def present(self, name: str, challenge: challenges.KeyAuthorizationChallenge, validation: Any) -> None:
        """Have the answer in place when this returns. `name` is without `*.`. Raises `UsageError`."""

    def remove(self, name: str, challenge: challenges.KeyAuthorizationChallenge, validation: Any) -> None:
        """Take the answer away. Called after every `present`; must not raise."""


@dataclass(slots=True)
class HttpResponder:
    """http-01: what the shared HTTP port answers, by token. The port reads `answers` in the event loop's thread."""

    answers: dict[str, bytes] = field(default_factory=dict)

    def present(self, _name: str, challenge: challenges.KeyAuthorizationChallenge, validation: str) -> None:
        """See `Responder`."""
        self.answers[challenge.encode("token")] = validation.encode()

    def remove(self, _name: str, challenge: challenges.KeyAuthorizationChallenge, _validation: str) -> None:
        """See `Responder`."""
        self.answers.pop(challenge.encode("token"), None)


@dataclass(slots=True)
class TlsAlpnResponder:
    """tls-alpn-01: the context with which the shared TLS port answers, by name."""

    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def present(self, name: str, _challenge: challenges.KeyAuthorizationChallenge, validation: bytes) -> None:
        """See `Responder`."""
        self.contexts[name] = challenge_context(name, validation)

    def remove(self, name: str, _challenge: challenges.KeyAuthorizationChallenge, _validation: bytes) -> None:
        """See `Responder`."""
        self.contexts.pop(name, None)


@dataclass(frozen=True, slots=True)
class DnsHook:
    """dns-01 by a program of the operator's: it is called with `present NAME VALUE` and `remove NAME VALUE`, and the
    record must be visible at all name servers when `present` returns 0.
    """

    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    timeout: float = DNS_HOOK_TIMEOUT

    def present(self, name: str, _challenge: challenges.KeyAuthorizationChallenge, validation: str) -> None:
        """See `Responder`."""
        self._call("present", name, validation)

    def remove(self, name: str, _challenge: challenges.KeyAuthorizationChallenge, validation: str) -> None:
        """See `Responder`. A record that stays does no harm."""
        with contextlib.suppress(UsageError):
            self._call("remove", name, validation)

    def _call(self, action: str, name: str, value: str) -> None:
        record = record_name(name)
        command = [*self.command, action, record, value]
        try:
            program = subprocess.Popen(  # the operator's own program; a session of its own, to stop all that it starts
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=self.environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"could not run {self.command[0]} (acme.dns_hook): {error.strerror}") from error
        with program:
            try:
                output, _ = program.communicate(timeout=self.timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                raise UsageError(
                    f"{self.command[0]} {action} {record} took more than {self.timeout:g} s (acme.dns_hook_timeout)"
                ) from None
        if program.returncode != 0:
            said = output.decode(errors="replace").strip()[-MAX_HOOK_OUTPUT:]
            raise UsageError(f"{self.command[0]} {action} {record} failed with status {program.returncode}: {said}")


def record_name(name: str) -> str:
    """The name of the record that proves `name` by dns-01."""
    return f"_acme-challenge.{name}"


def challenge_context(name: str, digest: bytes) -> ssl.SSLContext:
    """The TLS context that answers tls-alpn-01 for `name`: a self-signed certificate with `digest` in it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.UnrecognizedExtension(ACME_IDENTIFIER, b"\x04\x20" + digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([ALPN])
    with tempfile.TemporaryDirectory() as folder:  # the standard library reads certificates from files only
        pem = Path(folder) / "challenge.pem"
        pem.touch(mode=0o600)
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(pem)
    return context
