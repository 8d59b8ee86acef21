"""TLS contexts of servers and clients, from certificate files, pins or the system's authorities."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from tunneld.errors import ConfigError, reason_of
from tunneld.tls.pins import PinnedContext
from tunneld.tls.session import require_close_notify


class CertificateFiles(Protocol):
    """The files of a server's certificate, as the configuration names them."""

    @property
    def certificate(self) -> Path:
        """The certificate chain, in PEM."""

    @property
    def key(self) -> Path:
        """Its private key, in PEM, not encrypted."""

    @property
    def client_ca(self) -> Path | None:
        """Authorities that must have issued the client's certificate; None: no client certificate is requested."""


def server_tls_context(settings: CertificateFiles, *, table: str = "") -> ssl.SSLContext:
    """A server's context: TLS 1.2 or later. If `client_ca` is set, clients must have a certificate issued by it.

    Raises `ConfigError`, which names the `table` of the configuration, the file, and what is wrong with it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it costs us more than the peer; OpenSSL 3 refuses it by default
    require_close_notify(context)
    try:
        _load_certificate(context, settings.certificate, settings.key)
        if settings.client_ca is not None:
            _load_authorities(context, settings.client_ca, "client_ca")
            context.verify_mode = ssl.CERT_REQUIRED
    except ConfigError as error:
        raise ConfigError([f"{table}: {problem}" if table else problem for problem in error.problems]) from None
    return context


def client_tls_context(
    ca: Path | str | None = None,
    certificate: Path | str | None = None,
    key: Path | str | None = None,
    *,
    pin: str | None = None,
) -> ssl.SSLContext:
    """A client's context: TLS 1.2 or later. It trusts the system's authorities, or the ones in the file `ca`, or only
    the certificate with the fingerprint `pin`. With `ca` and `pin`, a certificate must satisfy both.

    `certificate` and `key` (by default in the same file) are for relays that require a client certificate. Raises
    `ConfigError`, `UsageError`.
    """
    context = PinnedContext.make(pin) if pin is not None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    require_close_notify(context)
    if ca is not None:
        _load_authorities(context, Path(ca), "ca")
    elif pin is not None:
        _disable_verification(context)  # the pin is checked instead
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        _load_certificate(context, Path(certificate), Path(key or certificate))
    return context


def unverified_tls_context(certificate: Path | str | None = None, key: Path | str | None = None) -> ssl.SSLContext:
    """A client's context that verifies nothing: no protection against an attacker on the path. See
    `client_tls_context`.
    """
    context = client_tls_context(None, certificate, key)
    _disable_verification(context)
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _check_readable(certificate, "certificate")
    _check_readable(key, "key")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError([f"key {key} does not belong to certificate {certificate}"]) from None
        if error.reason and ("TOO_SMALL" in error.reason or "TOO_WEAK" in error.reason):
            raise ConfigError([f"certificate {certificate} is too weak for TLS: {error.reason.lower()}"]) from None
        raise ConfigError([f"could not load certificate {certificate} with key {key}: not PEM files"]) from None


def _disable_verification(context: ssl.SSLContext) -> None:
    context.check_hostname = False  # first: the next line raises otherwise
    context.verify_mode = ssl.CERT_NONE


def _no_password() -> str:
    """Called by OpenSSL, which would otherwise ask on the terminal. A daemon has none."""
    raise ConfigError(["the key is protected by a passphrase, which a daemon cannot ask for; remove the passphrase"])


def _load_authorities(context: ssl.SSLContext, path: Path, key: str) -> None:
    _check_readable(path, key)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError([f"{key} {path} contains no PEM certificate"]) from None


def _check_readable(path: Path, what: str) -> None:
    """Check first, because OpenSSL's `No such file` does not say which file."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError([f"could not read {what} {path}: {reason_of(error)}"]) from None
