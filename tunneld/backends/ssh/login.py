"""Authentication: which clients may log in, and as what.

    KEY@relay      the key of an open tunnel, as `openTunnel ssh` returned it. Like a bearer token it is its own proof,
                   sent inside the encrypted connection, so nothing else is required.
    NAME@relay     a public key in the `authorized_keys` of a credential, or a certificate of an authority in it. The
                   name is free and becomes part of the tunnel's label.

A relay without credentials requires no authentication, like its other ports, and then accepts only local clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asyncssh

from tunneld.auth.authenticator import Authenticator
from tunneld.backends.ssh.side import SshServerSide, find_side
from tunneld.config.credentials import Credential
from tunneld.config.ssh_keys import may_forward, split
from tunneld.net.endpoint import is_loopback
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.tunnel.keys import KeyRegistry

CREDENTIAL_OPTION = "tunneld-credential"
"""An option that we put in front of each line of authorized_keys: the name of the line's credential."""

DROPPED_OPTIONS = frozenset({"restrict", "port-forwarding", "no-port-forwarding", CREDENTIAL_OPTION})
"""Options of authorized_keys that are not passed to asyncssh."""


@dataclass(frozen=True, slots=True)
class SshLogin:
    """An authenticated client."""

    user: str  # its user name
    side: SshServerSide | None = None  # of the tunnel, if the user name was its key; None: the client opens tunnels
    credential: Credential | None = None
    proof: str = ""  # the fingerprint of its public key

    def grant(self, authenticator: Authenticator) -> Grant | None:
        """What the client may do now; None if its credential was removed, or if it may only serve its tunnel."""
        if self.side is not None:
            return None
        if self.credential is None:
            return EVERYBODY if authenticator.is_open else None
        return authenticator.renew(self.credential)

    @property
    def owner(self) -> str:
        """The credential's name, which owns the tunnels that the client opens; empty without a credential."""
        return self.credential.name if self.credential is not None else ""


class SshAuthenticator:
    """Verifies logins against open tunnels and credentials, as they are now: a reload applies to the next login."""

    def __init__(self, authenticator: Authenticator, registry: KeyRegistry) -> None:
        self._authenticator = authenticator
        self._registry = registry
        self._parsed_credentials: Sequence[Credential] = ()  # that `_keys` were parsed from
        self._keys: dict[tuple[str, ...], asyncssh.SSHAuthorizedKeys] = {}  # by the names of the credentials

    def login_without_key(self, user: str, peer_host: str, local_host: str) -> SshLogin | None:
        """The login of a client that needs no public key: its user name is a tunnel's key, or the relay has no
        credentials and both the client and `local_host`, the address that it connected to, are loopback. Otherwise
        None.
        """
        side = find_side(self._registry, user)
        if side is not None:
            return SshLogin(user, side)
        is_local = is_loopback(peer_host) and is_loopback(local_host)  # the former is another's behind a proxy
        return SshLogin(user) if self._authenticator.is_open and is_local else None

    def keys_for(self, host: str) -> asyncssh.SSHAuthorizedKeys | None:
        """The public keys that a client at the address `host` may use; None if there are none. Parsed once per set of
        credentials, not once per connection.
        """
        credentials = self._authenticator.credentials
        if credentials is not self._parsed_credentials:
            self._parsed_credentials = credentials
            self._keys.clear()
        admitted = [each for each in credentials if each.authorized_keys and each.grant.admits(host)]
        names = tuple(each.name for each in admitted)
        if names and names not in self._keys:
            self._keys[names] = asyncssh.import_authorized_keys("\n".join(_lines(admitted)))
        return self._keys.get(names)

    def login_with_key(self, user: str, name: str, proof: str) -> SshLogin | None:
        """The login of a client that has proved a key of the credential `name`; None if that was removed since."""
        credential = next((each for each in self._authenticator.credentials if each.name == name), None)
        return None if credential is None else SshLogin(user, None, credential, proof)


def _lines(credentials: Iterable[Credential]) -> Iterable[str]:
    for credential in credentials:
        for line in credential.authorized_keys or ():
            yield tagged(credential.name, line)


def tagged(name: str, line: str) -> str:
    """A line of authorized_keys with its credential's name, and with `restrict` in terms of options that asyncssh
    knows.
    """
    options, key = split(line)
    kept = [option for option in options if option.partition("=")[0].lower() not in DROPPED_OPTIONS]
    forwarding = [] if may_forward(options) else ["no-port-forwarding"]
    return ",".join([f'{CREDENTIAL_OPTION}="{name}"', *kept, *forwarding]) + f" {key}"
