"""What asyncssh asks about a connection: may this one come in, may it listen, may it have a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import asyncssh

from tunneld.backends.ssh.fast import FastConnection
from tunneld.backends.ssh.login import OPTION, SshAuthenticator, SshLogin
from tunneld.net.endpoint import unmap


class SshServerEvents(Protocol):
    """Whoever has the connection: told once it is known whose it is, and asked for what it wants then."""

    def on_login(self, login: SshLogin) -> None:
        """It is known."""

    def listen(self, host: str, port: int) -> Awaitable[asyncssh.SSHListener | bool]:
        """`-R host:port:...`: a listener, or False where it is refused."""

    def refuse(self, reason: str) -> None:
        """Tell it why something was refused."""

    def session(self) -> asyncssh.SSHServerSession[str]:
        """A shell, or a word, is asked for."""


class SshServer(asyncssh.SSHServer):
    """The decisions about one connection."""

    connection: FastConnection

    def __init__(self, doorkeeper: SshAuthenticator, guest: SshServerEvents, tell_banner: Callable[[str], str]) -> None:
        """`tell_banner` says what a user of this name should know who is asked for a key; empty: nothing."""
        self._doorkeeper = doorkeeper
        self._guest = guest
        self._tell_banner = tell_banner
        self._user = ""
        self._login: SshLogin | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """See asyncssh."""
        assert isinstance(conn, FastConnection)
        self.connection = conn

    def begin_auth(self, username: str) -> bool:
        """Whether a proof is needed."""
        self._user = username
        peer, local = (unmap(self.connection.get_extra_info(name)[0]) for name in ("peername", "sockname"))
        self._login = self._doorkeeper.admit_bearer(username, local)
        if self._login is not None:
            return False
        self.connection.set_authorized_keys(self._doorkeeper.keys_for(peer))
        if text := self._tell_banner(username):
            self.connection.send_auth_banner(text)
        return True

    def public_key_auth_supported(self) -> bool:
        """Where a credential has keys: see `begin_auth`."""
        return False

    def auth_completed(self) -> None:
        """It is known who this is."""
        login = self._login
        if login is None:
            names = self.connection.get_key_option(OPTION)
            assert isinstance(names, list)
            login = self._doorkeeper.admit_key(self._user, names[0], self.connection.proof)
        if login is None:  # the credential was removed while the proof was on its way
            raise asyncssh.DisconnectError(asyncssh.DISC_BY_APPLICATION, "the credential is gone")
        self._guest.on_login(login)

    # What one may ask for then

    async def server_requested(self, listen_host: str, listen_port: int) -> asyncssh.SSHListener | bool:
        """`-R`."""
        return await self._guest.listen(listen_host, listen_port)

    def unix_server_requested(self, listen_path: str) -> bool:
        """`-R /socket:...`."""
        self._guest.refuse(
            f"{listen_path[:80]!r} is not listened on: this relay forwards ports, so say -R 0:... or -R PORT:..."
        )
        return False

    def session_requested(self) -> asyncssh.SSHServerSession[str]:
        """A shell, or a word."""
        return self._guest.session()
