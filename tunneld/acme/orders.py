"""The blocking work of an order, for worker threads: settings in, a stored certificate out.

This module imports the libraries of ACME, which takes 0.3 s; the manager imports it when the first order is placed.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tunneld.acme.challenges import DnsHook, HttpResponder, Responder, TlsAlpnResponder
from tunneld.acme.issuer import Issuer
from tunneld.acme.schedule import STAGING
from tunneld.acme.state import ACCOUNT_KEY, Issued, account_folder
from tunneld.config.certificates import AcmeSettings, name_server


@dataclass(slots=True)
class Orders:
    """Places orders as the settings say. Its methods may be called in several threads at once: each order has a
    connection to the authority of its own, and idle ones are used again.
    """

    settings: AcmeSettings
    state: Path
    answers: dict[str, bytes]  # of http-01 by token, for the shared HTTP port
    contexts: dict[str, ssl.SSLContext]  # of tls-alpn-01 by name, for the shared TLS port
    ports: Collection[str]  # the challenges that the ports of this relay answer
    _idle: list[Issuer] = field(default_factory=list)

    def obtain(self, name: str, attempt: int) -> Issued:
        """Order a certificate. `attempt` chooses another challenge each time. Raises `TunneldError`."""
        issuer = self._idle.pop() if self._idle else self._new_issuer(self.settings.directory)
        issued = issuer.obtain([name], attempt)
        self._idle.append(issuer)  # not after a failure: the next order begins afresh
        return issued

    def renewal_time(self, file: Path) -> tuple[float | None, float]:
        """When the authority suggests to renew the certificate in `file`, and when to ask again, in seconds since 1970.
        Raises `TunneldError` or OSError.
        """
        issuer = self._idle.pop() if self._idle else self._new_issuer(self.settings.directory)
        suggestion, again = issuer.renewal_time(_leaf(file))
        self._idle.append(issuer)
        return _seconds(suggestion) if suggestion is not None else None, _seconds(again)

    def trial(self, name: str, on_step: Callable[[str], None]) -> None:
        """Order a certificate that is thrown away, at the staging directory of an authority that has one. Raises
        `TunneldError`.
        """
        directory = STAGING.get(self.settings.directory, self.settings.directory)
        issuer = self._new_issuer(directory)
        if directory != self.settings.directory:
            issuer.profile = ""  # a staging directory may have others
        issuer.obtain([name], on_step=on_step)
        on_step("the authority issued a certificate, which is thrown away")

    def _new_issuer(self, directory: str) -> Issuer:
        settings = self.settings
        return Issuer(
            directory, settings.contact, account_folder(self.state, directory) / ACCOUNT_KEY, self._responders(),
            profile=settings.profile, ca_file=settings.ca_file, deadline=settings.order_timeout,
        )  # fmt: skip

    def _responders(self) -> dict[str, Responder]:
        found: dict[str, Responder] = {}
        if "tls-alpn-01" in self.ports:
            found["tls-alpn-01"] = TlsAlpnResponder(self.contexts)
        if "http-01" in self.ports:
            found["http-01"] = HttpResponder(self.answers)
        update = self.settings.rfc2136
        if self.settings.dns_hook:
            found["dns-01"] = DnsHook(self.settings.dns_hook, timeout=self.settings.dns_hook_timeout)
        elif update is not None:
            from tunneld.acme.dns_update import DnsUpdate  # noqa: PLC0415  # dnspython is optional

            found["dns-01"] = DnsUpdate(
                name_server(update.server), update.key_name, update.key_secret_file, update.algorithm,
                update.timeout, update.propagation,
            )  # fmt: skip
        return found


def _leaf(file: Path) -> bytes:
    """The first certificate in a file with a key before it."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    return begin + file.read_bytes().partition(begin)[2].partition(end)[0] + end + b"\n"


def _seconds(when: datetime) -> float:
    return when.timestamp()
