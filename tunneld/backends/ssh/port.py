"""The shared port to which hidden servers come with their own ssh.

serve_ssh
├─ event loop              see loop.py: asyncssh's timers and tasks, for all connections
├─ door                    see doors.py
└─ guest ×N                a task each, until it is gone; cancelling it drops its forwards
   └─ session ×N           what is shown there

A newcomer waits in the lobby until its login.
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
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends.ssh import gcm
from tunneld.backends.ssh.connection import SshConnection, SshServerContext
from tunneld.backends.ssh.forwards import Leases
from tunneld.backends.ssh.login import SshAuthenticator
from tunneld.backends.ssh.loop import start_loop
from tunneld.backends.ssh.negotiation import EXCHANGES
from tunneld.config import schema
from tunneld.directory.service import TunnelService
from tunneld.engine.pump import Pump
from tunneld.errors import NotAllowedError, RemoteProtocolError
from tunneld.net.endpoint import format_peer, unmap
from tunneld.net.listeners import ReloadableListener

log: structlog.stdlib.BoundLogger = structlog.get_logger("ssh")


async def serve_ssh(
    door: ReloadableListener,
    settings: Callable[[], schema.SshSettings],
    key: asyncssh.SSHKey,
    service: TunnelService,
    lobby: HandshakeSupervisor,
    engine: Pump,
    gate: Authenticator,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ssh clients who come through `door` until cancelled. `settings` is asked anew for each newcomer; the relay
    is known by `key`. Whoever exchanges the door's listeners tells the service's endpoints.
    """
    gcm.register()
    async with trio.open_nursery() as nursery:
        loop = await start_loop(nursery, _tell_bug)
        house = SshServerContext(
            settings=settings,
            service=service,
            authenticator=gate,
            ssh_authenticator=SshAuthenticator(gate, service.keys),
            leases=Leases(service, lambda: settings().max_carriers),
            pump=engine,
            loop=loop,
            options=_OptionsCache(settings, key).get,
        )
        port = _SshPort(house, lobby, nursery)
        service.keys.set_port("ssh", "ssh", door.port)
        await nursery.start(door.serve, port.on_connection)
        task_status.started()


class _SshPort:
    """Who comes, and how many."""

    def __init__(self, house: SshServerContext, lobby: HandshakeSupervisor, nursery: trio.Nursery) -> None:
        self._house = house
        self._lobby = lobby
        self._nursery = nursery
        self._guests = 0

    def on_connection(self, connection: socket.socket, peer: Any) -> None:
        """Somebody connected: is there a place?"""
        settings = self._house.settings()
        if self._guests >= settings.max_connections:
            connection.close()
            log.info("ssh refused", peer=format_peer(peer), reason=f"{self._guests} are here (ssh.max_connections)")
            return
        self._lobby.start(connection, peer, "ssh", partial(self._hear_out, connection, peer), settings.login_timeout)

    async def _hear_out(self, connection: socket.socket, peer: Any) -> None:
        """See `handshakes.Handshake`: one connection, until it is authenticated or gone."""
        guest = SshConnection(self._house, connection, peer)
        await self._nursery.start(self._host, guest)
        try:
            guest.start()
            await guest.decided.wait()
        finally:
            if guest.login is None:
                guest.transport.end("it has not logged in")
        if guest.login is not None:
            return
        if guest.failures:
            raise NotAllowedError("it had no key of a credential or of an open tunnel")
        if guest.strange:
            self._house.authenticator.preauth.fail(unmap(peer[0]), trio.current_time())
            raise RemoteProtocolError(guest.reason)

    async def _host(self, guest: SshConnection, *, task_status: trio.TaskStatus[None]) -> None:
        """One guest, until it is gone; cancelling it drops its forwards."""
        self._guests += 1
        try:
            await guest.run(task_status=task_status)
        except Exception:
            log.exception("ssh connection failed: a bug")
        finally:
            self._guests -= 1


class _OptionsCache:
    """asyncssh's options, made anew where the settings changed."""

    def __init__(self, settings: Callable[[], schema.SshSettings], key: asyncssh.SSHKey) -> None:
        self._settings = settings
        self._key = key
        self._made_of: schema.SshSettings | None = None
        self._options: asyncssh.SSHServerConnectionOptions

    def get(self) -> asyncssh.SSHServerConnectionOptions:
        """For the next connection."""
        settings = self._settings()
        if settings is not self._made_of:
            self._made_of = settings
            self._options = asyncssh.SSHServerConnectionOptions(
                config=None,
                server_host_keys=[self._key],
                server_version=f"tunneld_{__version__}",
                kex_algs=[name for name in EXCHANGES if name.encode() in asyncssh.kex.get_kex_algs()],
                compression_algs=["none"],
                host_based_auth=False,
                kbdint_auth=False,
                password_auth=False,
                gss_host=None,
                login_timeout=0,  # the port's deadline
                keepalive_interval=0,  # the carrier's heartbeat
                rekey_bytes=settings.rekey_octets,
                rekey_seconds=settings.rekey_interval,
                line_editor=False,
                agent_forwarding=False,
                x11_forwarding=False,
                allow_scp=False,
                errors="replace",
            )
        return self._options


def _tell_bug(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody waited for: it costs its connection, at most."""
    log.error("ssh: a task failed", reason=str(context.get("message")), exc_info=context.get("exception"))
