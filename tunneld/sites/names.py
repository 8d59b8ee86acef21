"""What tunnels with host names share: the table of names, and the ports on which they are reached."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from tunneld.errors import UsageError
from tunneld.net.address import HostName
from tunneld.net.endpoint import Endpoint
from tunneld.policy.names import SiteTable
from tunneld.sites.guard import GuardServices
from tunneld.sites.proofs import DomainProofs, ProofSettings
from tunneld.sites.site import Site

RANDOM_LENGTH = 10
"""Characters of a random label: 10 of 31 are 49 bits, so guessing one of 10 000 takes 10^10 requests."""
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
"""Letters and digits that are not mistaken for each other when a name is read aloud or copied by hand."""


class NameSettings(ProofSettings, Protocol):
    """What is read of `[names]`."""

    @property
    def max_names(self) -> int:
        """Names of the relay."""


class SharedNames:
    """The host names of a relay that are in use, and where visitors reach them."""

    def __init__(
        self,
        settings: Callable[[], NameSettings],
        has_certificate: Callable[[str], bool],
        guards: GuardServices | None = None,
    ) -> None:
        """`has_certificate` tells whether TLS for a name can end at the relay."""
        self.settings = settings
        self.guards = guards or GuardServices()
        self.proofs = DomainProofs(settings)
        self.sites = SiteTable[Site](lambda: settings().max_names)
        self.on_taken: Callable[[HostName, str], None] = _ignore  # with the name, and the owner; TLS ends here
        self.on_freed: Callable[[HostName, str], None] = _ignore
        self.is_reserved: Callable[[str], bool] = lambda _name: False  # for a tunnel, open or closed
        self.is_draining: Callable[[], bool] = lambda: False  # the relay accepts no new visitors
        self.on_draining: Callable[[], None] = lambda: None  # that begins
        self.obtains_certificates: Callable[[], bool] = lambda: False  # whether each name taken gets a certificate
        self.last_failure: Callable[[str], str] = lambda _name: ""  # why an order of its certificate failed
        self._has_certificate = has_certificate
        self._ports = {"http": 0, "https": 0}

    def set_port(self, scheme: str, port: int) -> None:
        """`http` or `https` listens on this port; 0: it does not."""
        self._ports[scheme] = port

    @property
    def https_port(self) -> int:
        """The port for TLS; 0: there is none."""
        return self._ports["https"]

    @property
    def is_open(self) -> bool:
        """Whether visitors can come to host names."""
        return any(self._ports.values())

    def check(self, *, keeps_tls: bool = False) -> None:
        """Raise `UsageError` where this relay has no host names, or none whose TLS may end at the hidden server."""
        if not self.is_open:
            raise UsageError(
                "this relay has no host names, as neither names.http nor names.https is set; leave host out"
            )
        if keeps_tls and not self.https_port:
            raise UsageError("this relay has no HTTPS port (names.https); leave tls=pass out")

    def is_secure(self, name: str) -> bool:
        """Whether visitors can reach a name with https, which ends at the relay."""
        return bool(self.https_port) and self._has_certificate(name)

    def why_uncertified(self, name: str) -> str:
        """Why a name whose TLS ends at the relay has no certificate, where one was ordered; else empty."""
        return "" if self.is_secure(name) else self.last_failure(name)

    def uri(self, name: HostName, *, keeps_tls: bool = False) -> Endpoint:
        """The address to advertise for a name: with https where visitors can use that, now or soon."""
        secure = keeps_tls or self.is_secure(name.name) or self.obtains_certificates()
        scheme = "https" if self.https_port and (secure or not self._ports["http"]) else "http"
        return Endpoint(scheme, name.name, self._ports[scheme], path=name.path)


def random_name(domain: str) -> HostName:
    """A name under the relay's domain that cannot be guessed."""
    return HostName("".join(secrets.choice(_ALPHABET) for _ in range(RANDOM_LENGTH)) + "." + domain)


def is_random(name: HostName, domain: str) -> bool:
    """Whether it has the form of a `random_name`."""
    label, _, rest = name.name.partition(".")
    return rest == domain and not name.path and len(label) == RANDOM_LENGTH and set(label) <= set(_ALPHABET)


def _ignore(_name: HostName, _credential: str) -> None:
    """Nothing obtains certificates."""
