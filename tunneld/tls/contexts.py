"""TLS contexts: what we show, and whom we believe."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from tunneld.errors import ConfigError, reason_of
from tunneld.tls.connection import require_close_notify
from tunneld.tls.pins import PinnedContext


class CertificateFiles(Protocol):
    """The files of a server's certificate, as a configuration names them."""

    @property
    def certificate(self) -> Path:
        """The certificate chain, in PEM."""

    @property
    def key(self) -> Path:
        """Its private key, in PEM and not encrypted."""

    @property
    def client_ca(self) -> Path | None:
        """Authorities whose client certificates are required; None: no client certificate is asked for."""


def server_tls_context(settings: CertificateFiles, *, table: str = "control.tls") -> ssl.SSLContext:
    """TLS 1.2 or later with our certificate; where `client_ca` is set, only for peers with a certificate of it.

    Raises `ConfigError` naming the key in `table`, the file and what is wrong with it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a peer could have us do nothing else; OpenSSL 3 refuses by itself
    require_close_notify(context)
    _load_certificate(context, settings.certificate, settings.key, table)
    if settings.client_ca is not None:
        _load_authorities(context, settings.client_ca, f"{table}.client_ca")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls_context(
    ca: Path | str | None = None,
    certificate: Path | str | None = None,
    key: Path | str | None = None,
    *,
    pin: str | None = None,
) -> ssl.SSLContext:
    """TLS 1.2 or later that believes the system's authorities, or those in the file `ca`, or the one certificate with
    the fingerprint `pin`; or where both are given, only that one from those.

    `certificate` and `key` (by default in the same file) are for relays that ask. Raises `ConfigError`, `UsageError`.
    """
    context = PinnedContext.make(pin) if pin is not None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    require_close_notify(context)
    if ca is not None:
        _load_authorities(context, Path(ca), "ca")
    elif pin is not None:
        _believe_anybody(context)  # the pin does not
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        _load_certificate(context, Path(certificate), Path(key or certificate))
    return context


def unverified_tls_context(certificate: Path | str | None = None, key: Path | str | None = None) -> ssl.SSLContext:
    """TLS with whoever answers: safe from nobody who can change what is on the way. As `client_tls_context`."""
    context = client_tls_context(None, certificate, key)
    _believe_anybody(context)
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path, table: str = "") -> None:
    prefix = f"{table}." if table else ""
    _check_readable(certificate, f"{prefix}certificate")
    _check_readable(key, f"{prefix}key")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError([f"{prefix}key: {key} does not belong to the certificate in {certificate}"]) from None
        raise ConfigError(
            [f"{prefix}certificate: {certificate} and {key} are not a PEM certificate and its key"]
        ) from None


def _believe_anybody(context: ssl.SSLContext) -> None:
    context.check_hostname = False  # first, or the next line is refused
    context.verify_mode = ssl.CERT_NONE


def _no_password() -> str:
    raise ConfigError(["a key that asks for a password cannot be used by a daemon; write it without one"])


def _load_authorities(context: ssl.SSLContext, path: Path, key: str) -> None:
    _check_readable(path, key)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError([f"{key}: {path} has no PEM certificates"]) from None


def _check_readable(path: Path, key: str) -> None:
    """OpenSSL says `No such file` without saying which; so look first."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError([f"{key}: cannot read {path}: {reason_of(error)}"]) from None
