"""The shared port to which hidden servers connect with their own ssh clients.

serve_ssh
├─ TrioEventLoop           asyncssh's timers and tasks, for all connections; see loop.py
├─ ReloadableListener      accepts; see net/listeners.py
└─ SshConnection ×N        a task per connection; cancelling it ends its forwards
   └─ ConsoleSession ×N    the sessions' output

A new connection is a handshake under a deadline (auth/handshakes.py) until its login.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncssh
import structlog
import trio

from tunneld import __version__
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import FailedProofError, HandshakeSupervisor, NothingReceivedError
from tunneld.backends.ssh.connection import SshConnection, SshServerContext
from tunneld.backends.ssh.forwards import Leases
from tunneld.backends.ssh.login import SshAuthenticator
from tunneld.backends.ssh.loop import start_loop
from tunneld.backends.ssh.paths import choose_path
from tunneld.config import schema
from tunneld.directory.reply import Execute
from tunneld.directory.service import TunnelService
from tunneld.engine.pump import Pump
from tunneld.errors import RemoteProtocolError
from tunneld.net.endpoint import Peer, format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.policy.places import PlaceLimits, Places

log: structlog.stdlib.BoundLogger = structlog.get_logger("ssh")

KEY_EXCHANGES = (
    "mlkem768x25519-sha256",
    "sntrup761x25519-sha512@openssh.com",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
)
"""The key exchange methods on offer. Those over finite fields are left out: they cost an unauthenticated client little
and the relay much.
"""
SESSION_WINDOW = 4096
"""Bytes that a client may send on a session before the relay reads them: keys that a user pressed. asyncssh keeps them
until the session starts, with a hundred bytes for each packet.
"""


async def serve_ssh(
    listener: ReloadableListener,
    settings: Callable[[], schema.SshSettings],
    host_key: asyncssh.SSHKey,
    service: TunnelService,
    execute: Execute,
    handshakes: HandshakeSupervisor,
    engine: Pump,
    authenticator: Authenticator,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept ssh clients until cancelled; the daemon runs this. `settings` is called for each new connection. A caller
    that rebinds the listener must update `service.keys`. `execute` executes the commands of sessions.
    """
    path = choose_path()
    async with trio.open_nursery() as nursery:
        loop = await start_loop(nursery, _log_internal_error)
        context = SshServerContext(
            settings=settings,
            service=service,
            execute=execute,
            authenticator=authenticator,
            ssh_authenticator=SshAuthenticator(authenticator, service.keys),
            leases=Leases(service, lambda: settings().max_carriers),
            pump=engine,
            loop=loop,
            options=_OptionsCache(settings, host_key, is_fast=path.is_fast).get,
            path=path,
            places=Places("ssh connection", "ssh.max_connections", lambda: _place_limits(settings(), service)),
        )
        port = _SshPort(context, handshakes, nursery)
        service.keys.set_port("ssh", "ssh", listener.port)
        await nursery.start(listener.serve, port.on_connection)
        task_status.started()


def _place_limits(settings: schema.SshSettings, service: TunnelService) -> PlaceLimits:
    share = service.settings().control.credential_share
    return PlaceLimits(settings.max_connections, settings.reserved_connections, share)


class _SshPort:
    """Limits, supervises and owns the connections."""

    def __init__(self, context: SshServerContext, handshakes: HandshakeSupervisor, nursery: trio.Nursery) -> None:
        self._context = context
        self._handshakes = handshakes
        self._nursery = nursery

    def on_connection(self, client_socket: socket.socket, peer: Peer) -> None:
        """The listener accepted a connection: start its handshake, unless there are too many connections."""
        if (reason := self._context.places.full) is not None:
            client_socket.close()
            self._context.authenticator.log_limited(
                log.info, "ssh client refused", "ssh", peer=format_peer(peer), reason=reason
            )
            return
        handshake = partial(self._handshake, client_socket, peer)
        self._handshakes.start(client_socket, peer, "ssh", handshake, self._context.settings().login_timeout)

    async def _handshake(self, client_socket: socket.socket, peer: Peer) -> None:
        """Wait for the login of one connection. Raises OSError or a `TunneldError` if it fails; the connection is
        closed then.
        """
        connection = SshConnection(self._context, client_socket, peer)
        await self._nursery.start(self._run, connection, peer[0])
        try:
            connection.start()
            await connection.decided.wait()
        finally:
            if connection.login is None:
                connection.transport.end("the client did not log in")
        if connection.login is not None:
            return
        if connection.failures:
            reason = "no accepted public key, and the user name is not the key of an open tunnel"
            raise FailedProofError(reason, connection.user)
        if connection.broke_protocol:
            self._context.authenticator.preauth.fail(peer[0], trio.current_time())
            raise RemoteProtocolError(connection.reason)
        if connection.transport.has_received:
            raise RemoteProtocolError("the client left before it had logged in")
        raise NothingReceivedError("the client closed the connection without a word")

    async def _run(self, connection: SshConnection, host: str, *, task_status: trio.TaskStatus[None]) -> None:
        """Run one connection from the address `host` until it is closed."""
        try:
            await connection.run(task_status=task_status)
        except Exception:
            log.exception("internal error: ssh connection closed")
        finally:
            if connection.login is not None:  # until now, a peer at this address was authenticated
                self._context.authenticator.remember_login(host)


class _OptionsCache:
    """asyncssh's options, created anew when the settings have changed."""

    def __init__(self, settings: Callable[[], schema.SshSettings], host_key: asyncssh.SSHKey, *, is_fast: bool) -> None:
        self._settings = settings
        self._is_fast = is_fast
        self._host_key = host_key
        self._cached_for: schema.SshSettings | None = None
        self._options: asyncssh.SSHServerConnectionOptions

    def get(self) -> asyncssh.SSHServerConnectionOptions:
        """The options of the next connection."""
        settings = self._settings()
        if settings is not self._cached_for:
            self._cached_for = settings
            self._options = asyncssh.SSHServerConnectionOptions(
                config=None,
                server_host_keys=[self._host_key],
                server_version=f"tunneld_{__version__}",
                kex_algs=[name for name in KEY_EXCHANGES if name.encode() in asyncssh.kex.get_kex_algs()],
                compression_algs=["none"],
                host_based_auth=False,
                kbdint_auth=False,
                password_auth=False,
                gss_host=None,
                login_timeout=0,  # `HandshakeSupervisor` has the deadline
                keepalive_interval=0 if self._is_fast else settings.heartbeat,  # `SshCarrier` has its own
                keepalive_count_max=2,
                rekey_bytes=settings.rekey_octets,
                rekey_seconds=settings.rekey_interval,
                line_editor=False,
                agent_forwarding=False,
                x11_forwarding=False,
                allow_scp=False,
                window=SESSION_WINDOW,
                errors="replace",
            )
        return self._options


def _log_internal_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception of asyncio code that was not handled. It costs its connection at most."""
    log.error("internal error in an ssh task", reason=str(context.get("message")), exc_info=context.get("exception"))
