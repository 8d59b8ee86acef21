"""Who connects, and by what proof.

    KEY@relay      the key of an open tunnel, as `openTunnel ssh` gave it: a bearer's proof, inside the encrypted
                   connection, so nothing else is asked
    NAME@relay     a public key, or a certificate of an authority, that stands in the `authorized_keys` of a credential;
                   the name is free, and is part of what the tunnel is called

Without credentials nobody is asked, as on the other faces; and as they, only on this machine.
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

OPTION = "tunneld-credential"
"""The option of a line of authorized_keys, put in front by us, that says whose line it is."""

DROPPED = frozenset({"restrict", "port-forwarding", "no-port-forwarding", OPTION})


@dataclass(frozen=True, slots=True)
class SshLogin:
    """Somebody known."""

    user: str  # the name that they gave
    side: SshServerSide | None = None  # the tunnel whose key they have; None: they open tunnels
    credential: Credential | None = None
    proof: str = ""  # the fingerprint of their key

    def grant(self, gate: Authenticator) -> Grant | None:
        """What they may do now; None where their credential is gone."""
        if self.credential is None:
            return EVERYBODY if gate.is_open else None
        return gate.renew(self.credential)

    @property
    def owner(self) -> str:
        """Whose tunnels they open; empty where nobody is asked."""
        return self.credential.name if self.credential is not None else ""


class SshAuthenticator:
    """What logins are held against; asked anew each time, so that a reload applies to the next."""

    def __init__(self, gate: Authenticator, endpoints: KeyRegistry) -> None:
        self._gate = gate
        self._endpoints = endpoints
        self._read_from: Sequence[Credential] = ()  # what `_keys` are of
        self._keys: dict[tuple[str, ...], asyncssh.SSHAuthorizedKeys] = {}  # by the names of the credentials

    def admit_bearer(self, user: str, local_host: str) -> SshLogin | None:
        """Somebody who needs no other proof, at an address of ours."""
        side = find_side(self._endpoints, user)
        if side is not None:
            return SshLogin(user, side)
        return SshLogin(user) if self._gate.is_open and is_loopback(local_host) else None

    def keys_for(self, host: str) -> asyncssh.SSHAuthorizedKeys | None:
        """The keys that may be used from the address `host`; None where there are none. Read once, not once a
        stranger.
        """
        credentials = self._gate.credentials
        if credentials is not self._read_from:
            self._read_from = credentials
            self._keys.clear()
        admitted = [each for each in credentials if each.authorized_keys and each.grant.admits(host)]
        names = tuple(each.name for each in admitted)
        if names and names not in self._keys:
            self._keys[names] = asyncssh.import_authorized_keys("\n".join(_lines(admitted)))
        return self._keys.get(names)

    def admit_key(self, user: str, name: str, proof: str) -> SshLogin | None:
        """Somebody who proved to have a key of the credential `name`."""
        credential = next((each for each in self._gate.credentials if each.name == name), None)
        return None if credential is None else SshLogin(user, None, credential, proof)


def _lines(credentials: Iterable[Credential]) -> Iterable[str]:
    for credential in credentials:
        for line in credential.authorized_keys or ():
            yield tagged(credential.name, line)


def tagged(name: str, line: str) -> str:
    """A line of authorized_keys that says whose it is, with `restrict` in words that asyncssh knows."""
    options, key = split(line)
    kept = [option for option in options if option.partition("=")[0].lower() not in DROPPED]
    return (
        ",".join([f'{OPTION}="{name}"', *kept, *([] if may_forward(options) else ["no-port-forwarding"])]) + f" {key}"
    )
