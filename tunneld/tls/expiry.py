"""Whether the certificates that we show are good today: the relay says so before its agents find out.

The standard library reads no certificates, but it checks them. So we shake hands with ourselves, in memory, as somebody
who believes in nothing but this very certificate: what is left to object to are its dates. (A library that reads them
is there, but would cost a relay without SSH a quarter of its memory.)
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
SOON = 14 * DAY
"""Seconds. What renews by itself does so a month before (Let's Encrypt's clients): what has not by then does not work,
or does not tell the daemon.
"""
LAST_PART = 0.25
"""Of its life, for a certificate that lives shorter: one of six days is renewed with two or three left."""

Shown = tuple[ssl.SSLContext, Path]
"""What shows a certificate, and its file."""


def look(shown: Iterable[Shown], now: float | None = None) -> list[str]:
    """Say what is the matter with each, to the log; and the same, in a few words each, for whoever asks later."""
    return list(_complaints({path: context for context, path in shown}, time.time() if now is None else now))


def _complaints(shown: dict[Path, ssl.SSLContext], now: float) -> Iterator[str]:
    for path, context in shown.items():
        match _remaining(context, path):
            case int(code):
                reason = "has expired" if code == EXPIRED else "is not valid yet: is the clock right?"
                log.error("certificate is refused by whoever checks it", file=str(path), reason=reason)
                yield f"certificate {path} {reason}"
            case (begin, end) if end - now < min(SOON, LAST_PART * (end - begin)):
                days = max(0, int((end - now) / DAY))
                log.warning("certificate expires soon", file=str(path), days=days)
                yield f"certificate {path} expires in {days} {'day' if days == 1 else 'days'}"


def _remaining(context: ssl.SSLContext, path: Path) -> tuple[int, int] | int | None:
    """From when until when it is good, in seconds since 1970; or why it is not, of `NOT_YET` and `EXPIRED`; None where
    that cannot be told.
    """
    theirs, ours = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(theirs, ours, server_side=True)
    try:
        client = _believer(path).wrap_bio(ours, theirs)
        for _ in range(4):  # two would do for TLS 1.3
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                found = client.getpeercert() or {}
                begin, end = str(found["notBefore"]), str(found["notAfter"])
                return ssl.cert_time_to_seconds(begin), ssl.cert_time_to_seconds(end)
            with suppress(ssl.SSLWantReadError):
                server.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_code if error.verify_code in {NOT_YET, EXPIRED} else None
    except (OSError, ValueError):  # a file that is gone by now, say
        return None
    return None


def _believer(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be an authority
    context.load_verify_locations(path)
    return context
