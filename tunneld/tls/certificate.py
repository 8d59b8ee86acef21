"""A server's certificate: its files, the names and dates in it, and whether clients accept it today.

The standard library cannot parse certificates, but it verifies them. So a certificate is shown once, in memory, to a
client that trusts nothing but this very certificate and ignores dates; the names and dates are known then. (A library
that parses certificates is installed, but importing it would cost a relay without SSH a quarter of its memory.)
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunneld.tls.contexts import CertificateFiles, server_tls_context

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
IGNORE_DATES = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name."""


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """The files of a certificate, and what is in it: its names in lower case, and its validity in seconds since 1970.

    `names` is empty and the dates are None if a client would reject the certificate for another reason than its dates,
    such as a purpose that does not include servers; `rejected` is this reason.
    """

    files: CertificateFiles
    names: tuple[str, ...] = ()
    not_before: float | None = None
    not_after: float | None = None
    rejected: str = ""

    @classmethod
    def read(cls, files: CertificateFiles, table: str = "") -> tuple[ServerCertificate, ssl.SSLContext]:
        """Load the files; returns the certificate and a context that shows it. Takes two milliseconds.

        Raises `ConfigError`, which names the `table` of the configuration, the file, and what is wrong with it.
        """
        context = server_tls_context(files, table=table)
        try:
            return cls(files, *_facts(context, files.certificate)), context
        except ssl.SSLCertVerificationError as error:
            return cls(files, rejected=error.verify_message), context
        except (OSError, ValueError):  # the file was replaced a moment ago: the context shows the old certificate
            return cls(files), context

    def problem(self, now: float) -> str:
        """Why clients reject this certificate, or will soon; empty if they do not. `now` is in seconds since 1970."""
        path = self.files.certificate
        if self.rejected:
            return f"certificate {path} is rejected by clients that verify it: {self.rejected}"
        if self.not_before is None or self.not_after is None:
            return ""
        if now > self.not_after:
            return f"certificate {path} has expired"
        if now < self.not_before:
            return f"certificate {path} is not valid yet: check this machine's clock"
        lifetime, left = self.not_after - self.not_before, self.not_after - now
        if left >= min(WARN_BEFORE, WARN_FRACTION * lifetime):
            return ""
        days = int(left / DAY)
        return f"certificate {path} expires in {days} {'day' if days == 1 else 'days'}"

    def is_valid(self, now: float) -> bool:
        """Whether the dates are known and include `now`."""
        return self.not_before is not None and self.not_after is not None and self.not_before <= now <= self.not_after


def _facts(context: ssl.SSLContext, path: Path) -> tuple[tuple[str, ...], float, float]:
    """The names and the validity of the certificate that a server's context shows. Raises OSError or `ValueError`."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = _trusting(path).wrap_bio(to_client, to_server)
    for _ in range(HANDSHAKE_ROUNDS):
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
            shown = client.getpeercert() or {}
            begin, end = (ssl.cert_time_to_seconds(str(shown[key])) for key in ("notBefore", "notAfter"))
            names = (str(each[1]).lower() for each in shown.get("subjectAltName", ()) if each[0] == "DNS")
            return tuple(dict.fromkeys(names)), float(begin), float(end)
        with suppress(ssl.SSLWantReadError):
            server.do_handshake()
    raise ValueError("the handshake did not end")


def _trusting(path: Path) -> ssl.SSLContext:
    """A client's context that trusts only the certificates in this file, and for ever."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | IGNORE_DATES  # the file need not hold an authority
    context.load_verify_locations(path)
    return context
