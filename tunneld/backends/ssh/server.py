"""asyncssh's callbacks for one connection: authentication, port forwarding, sessions."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol

import asyncssh

from tunneld.backends.ssh.login import CREDENTIAL_OPTION, SshAuthenticator, SshLogin

if TYPE_CHECKING:
    from tunneld.backends.ssh.paths import ClientConnection


class SshServerEvents(Protocol):
    """The connection that receives what asyncssh reports; see `SshConnection`."""

    user: str
    """The name with which the client wants to log in."""

    def on_login(self, login: SshLogin) -> None:
        """The client has logged in."""

    def listen(self, host: str, port: int) -> Awaitable[asyncssh.SSHListener | bool]:
        """The client requested `-R host:port:...`: a listener, or False if that is refused."""

    def refuse(self, reason: str) -> None:
        """Tell the user why a request was refused."""

    def session(self) -> asyncssh.SSHServerSession[str]:
        """The client requested a session. Raises `asyncssh.ChannelOpenError`."""


class SshServer(asyncssh.SSHServer):
    """Decides about one connection. asyncssh calls its methods."""

    def __init__(self, authenticator: SshAuthenticator, events: SshServerEvents, connection: ClientConnection) -> None:
        self.connection = connection
        self._authenticator = authenticator
        self._events = events
        self._user = ""
        self._login: SshLogin | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncssh.SSHServer.connection_lost`."""
        self.connection.on_ssh_lost(exc)

    def begin_auth(self, username: str) -> bool:
        """Whether the client must authenticate with a public key."""
        self._user = self._events.user = username
        transport = self.connection.transport  # asyncssh forgets it when it closes, and may call this after that
        peer, local = (transport.get_extra_info(name)[0] for name in ("peername", "sockname"))
        self._login = self._authenticator.login_without_key(username, peer, local)
        if self._login is not None:
            return False
        self.connection.set_authorized_keys(self._authenticator.keys_for(peer))
        return True

    def public_key_auth_supported(self) -> bool:
        """False: asyncssh verifies keys against the ones that `begin_auth` set, without a callback."""
        return False

    def auth_completed(self) -> None:
        """The client has logged in."""
        login = self._login
        if login is None:
            names = self.connection.get_key_option(CREDENTIAL_OPTION)
            assert isinstance(names, list)
            login = self._authenticator.login_with_key(self._user, names[0], self.connection.key_fingerprint)
        if login is None:  # the credential was removed during the login
            raise asyncssh.DisconnectError(asyncssh.DISC_BY_APPLICATION, "the credential was removed")
        self._events.on_login(login)

    # Requests after the login

    async def server_requested(self, listen_host: str, listen_port: int) -> asyncssh.SSHListener | bool:
        """`-R PORT:...`."""
        return await self._events.listen(listen_host, listen_port)

    def unix_server_requested(self, listen_path: str) -> bool:
        """`-R /PATH:...`: refused."""
        self._events.refuse(
            f"cannot listen on {listen_path[:80]!r}: this relay forwards ports only; "
            "use -R 0:HOST:PORT or -R PORT:HOST:PORT"
        )
        return False

    def session_requested(self) -> asyncssh.SSHServerSession[str]:
        """A shell or a command."""
        return self._events.session()
