"""Whether the relay's own certificates are valid today: the relay warns before its agents fail.

The standard library cannot parse certificates, but it verifies them. So each certificate is shown, in memory, to a
client that trusts nothing but this very certificate: then only its dates are left to object to. (A library that parses
certificates is installed, but importing it would cost a relay without SSH a quarter of its memory.)
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from tunneld.tls.connection import EXPIRED, NOT_YET

log: structlog.stdlib.BoundLogger = structlog.get_logger("daemon")

DAY = 86400.0
"""Seconds."""
WARN_BEFORE = 14 * DAY
"""Seconds before expiry. Clients that renew automatically (Let's Encrypt's) do so a month before: if the certificate
has not been renewed by then, renewal does not work or does not notify the daemon.
"""
WARN_FRACTION = 0.25
"""Fraction of a short lifetime: a certificate of six days is renewed with two or three left."""
HANDSHAKE_ROUNDS = 4
"""TLS 1.3 needs two."""

Shown = tuple[ssl.SSLContext, Path]
"""A server's context, and the file of the certificate that it shows."""


def look(shown: Iterable[Shown], now: float | None = None) -> list[str]:
    """Check each certificate, once per file. Logs every problem and returns all of them in a few words each.

    `now` is in seconds since 1970, by default the current time.
    """
    return list(_problems({path: context for context, path in shown}, time.time() if now is None else now))


def _problems(shown: dict[Path, ssl.SSLContext], now: float) -> Iterator[str]:
    for path, context in shown.items():
        match _validity(context, path):
            case int(code):
                reason = "has expired" if code == EXPIRED else "is not valid yet: check this machine's clock"
                log.error("clients reject the certificate", file=str(path), reason=reason)
                yield f"certificate {path} {reason}"
            case (begin, end) if end - now < min(WARN_BEFORE, WARN_FRACTION * (end - begin)):
                days = max(0, int((end - now) / DAY))
                log.warning("certificate expires soon", file=str(path), days=days)
                yield f"certificate {path} expires in {days} {'day' if days == 1 else 'days'}"


def _validity(context: ssl.SSLContext, path: Path) -> tuple[int, int] | int | None:
    """Begin and end of the certificate's validity, in seconds since 1970; or `NOT_YET` or `EXPIRED`; or None if it
    cannot be determined.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        client = _trusting(path).wrap_bio(to_client, to_server)
        for _ in range(HANDSHAKE_ROUNDS):
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                certificate = client.getpeercert() or {}
                begin, end = str(certificate["notBefore"]), str(certificate["notAfter"])
                return ssl.cert_time_to_seconds(begin), ssl.cert_time_to_seconds(end)
            with suppress(ssl.SSLWantReadError):
                server.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_code if error.verify_code in {NOT_YET, EXPIRED} else None
    except (OSError, ValueError):  # for example, the file has been removed since
        return None
    return None


def _trusting(path: Path) -> ssl.SSLContext:
    """A client's context that trusts only the certificates in this file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file need not hold an authority
    context.load_verify_locations(path)
    return context
