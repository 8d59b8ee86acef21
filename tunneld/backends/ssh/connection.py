"""One client's connection, from accept to close.

start      key exchange and login, under the port's deadline
on_login   the carrier is created; from now on the client may forward ports and open sessions
_on_lost   its forwards end. Their tunnels close if the client disconnected; otherwise they wait for it to reconnect.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import asyncssh
import structlog
import trio

from tunneld.auth.authenticator import Authenticator
from tunneld.backends.mux_side import carrier_limits
from tunneld.backends.ssh.console import MAX_SESSIONS, Console, ConsoleSession
from tunneld.backends.ssh.forwards import Forward, Leases
from tunneld.backends.ssh.login import SshAuthenticator, SshLogin
from tunneld.backends.ssh.loop import TrioEventLoop
from tunneld.backends.ssh.paths import SshPath
from tunneld.backends.ssh.server import SshServer
from tunneld.backends.ssh.side import SshServerSide
from tunneld.backends.ssh.transport import PREAUTH_BYTES_EXCEEDED, SshTransport
from tunneld.config import schema
from tunneld.directory.reply import Execute
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, NotAllowedError, TunneldError, UsageError
from tunneld.mux.connection import Connection
from tunneld.net.endpoint import Peer, format_peer
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.places import Place, Places
from tunneld.tunnel.tenants import Tenant
from tunneld.tunnel.tunnel import Tunnel

if TYPE_CHECKING:
    from tunneld.backends.ssh.paths import ForwardCarrier

log: structlog.stdlib.BoundLogger = structlog.get_logger("ssh")

MAX_REFUSALS = 100
"""Refused `-R` per connection: more than a user's mistakes, and each one is a line in the log."""
MAX_REASON_CHARACTERS = 200
"""Length of a logged reason, which may contain text from the peer."""


@dataclass(frozen=True, slots=True)
class SshServerContext:
    """What all connections of the SSH port share."""

    settings: Callable[[], schema.SshSettings]
    service: TunnelService
    execute: Execute
    authenticator: Authenticator
    ssh_authenticator: SshAuthenticator
    leases: Leases
    pump: Pump
    loop: TrioEventLoop
    options: Callable[[], asyncssh.SSHServerConnectionOptions]
    path: SshPath
    places: Places


class SshConnection:
    """One connection of a client. Implements `SshServerEvents` and `ConsoleUser`."""

    def __init__(self, context: SshServerContext, client_socket: socket.socket, peer: Peer) -> None:
        """Own the socket; `start` begins to serve it."""
        self.login: SshLogin | None = None
        self.forwards: list[Forward] = []
        self.asked = False  # the client has sent a -R
        self._undecided = 0  # of these
        self._decisions = trio.lowlevel.ParkingLot()
        self.decided = trio.Event()  # logged in, or closed before
        self.closed = trio.Event()
        self.reason = ""  # why it was closed
        self.broke_protocol = False  # the peer did, before or after its login
        self.user = ""  # the name with which the client wants to log in
        self.nursery: trio.Nursery  # of the tasks of its sessions
        self._context = context
        self._peer = peer
        self._settings = settings = context.settings()
        self._limits = carrier_limits(settings, settings.connection_memory)
        self._console = Console(self)
        self._refusals = 0
        self._place = Place(context.places)
        self._tenant = Tenant()  # of the owner, once the client has logged in
        self._carrier: ForwardCarrier | None = None
        self._draining = False
        self._disconnect_reason = ""  # that we sent to the client
        self._log = log.bind(peer=format_peer(peer))
        self.connection = connection = context.path.new_connection(context.loop, context.options())
        self.transport = connection.transport = SshTransport(
            context.pump, Connection(client_socket), peer, connection, self._limits, connection.on_transport_lost
        )
        connection.bind(lambda: SshServer(context.ssh_authenticator, self, connection), self._on_lost)

    def start(self) -> None:
        """Begin the SSH protocol. Raises OSError if the client has closed the connection."""
        self.connection.connection_made(self.transport)
        self.transport.start()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of its sessions until it is closed. Cancelling this closes it."""
        try:
            async with trio.open_nursery() as self.nursery:
                task_status.started()
                await self.closed.wait()
                self.nursery.cancel_scope.cancel()
        finally:
            self.transport.end("the relay stopped")

    @property
    def failures(self) -> int:
        """The number of failed authentications."""
        return self.connection.failures

    @property
    def service(self) -> TunnelService:
        """The tunnels of the relay."""
        return self._context.service

    @property
    def execute(self) -> Execute:
        """Executes the commands of its sessions."""
        return self._context.execute

    @property
    def requester(self) -> Requester:
        """The client as a requester. It has no grant if it logged in with a tunnel's key, which permits serving that
        tunnel and nothing else. Raises `NotAllowedError` if its credential was removed.
        """
        login, grant = self._authorize()
        owner = login.owner or format_peer(self._peer)
        local = self.transport.get_extra_info("sockname")[0]
        return Requester(self._peer[0], owner, local, grant)

    # Called by `SshServer`

    def on_login(self, login: SshLogin) -> None:
        """See `SshServerEvents.on_login`."""
        self.login = login
        grant = self._grant_of_owner(login)
        self._tenant = self.service.tenant_of(grant.name, self._peer[0])
        self.transport.turns.share = self._tenant.share(self._context.pump.budget)
        try:
            self._place.claim(grant)
        except LimitReachedError as error:
            self.disconnect(str(error))
            return
        self.transport.mark_authenticated()
        dial_timeout = self._settings.dial_timeout
        self._carrier = self._context.path.new_carrier(
            self.connection, self.transport, self._limits, dial_timeout, self._on_unresponsive
        )
        self._log = self._log.bind(credential=login.owner) if login.owner else self._log
        self._log.info("ssh client connected", user=login.user if login.side is None else "(a tunnel's key)")
        self.decided.set()

    def _grant_of_owner(self, login: SshLogin) -> Grant:
        """The grant of the credential that has this connection: the client's, or that of the tunnel's owner."""
        owner = login.owner
        if login.side is not None:
            owner = next(map(self._owner_of, self._tunnels_of({login.side.key})), "")
        credentials = self._context.authenticator.credentials
        return next((one.grant for one in credentials if one.name == owner), EVERYBODY)

    def _owner_of(self, tunnel: Tunnel) -> str:
        return self.service.live.record_of(tunnel.id).owner

    async def listen(self, host: str, port: int) -> asyncssh.SSHListener | bool:
        """See `SshServerEvents.listen`."""
        self.asked = True
        self._undecided += 1
        try:
            forward = await self._context.loop.trio_as_future(self._open_forward, (host, port))
        except TunneldError as error:
            self.refuse(str(error))
            return False
        finally:
            self._undecided -= 1
            self._decisions.unpark_all()
        self.connection.begin_when_answered(forward.begin)
        return ForwardListener(forward, self.transport.is_closing)

    async def forwards_decided(self) -> None:
        """See `ConsoleUser.forwards_decided`."""
        while self._undecided:
            await self._decisions.park()

    def refuse(self, reason: str) -> None:
        """Show `reason` in the sessions, and send it as a debug message, which `ssh -v` prints without a session."""
        self._refusals += 1
        self._log.info("-R refused", reason=reason)
        self._console.print_error(reason)
        if not self.closed.is_set():
            self.connection.send_debug(reason, always_display=True)
        if self._refusals >= MAX_REFUSALS:
            self.disconnect(f"{MAX_REFUSALS} port forwards were refused")

    def session(self) -> asyncssh.SSHServerSession[str]:
        """See `SshServerEvents.session`."""
        if self._console.sessions >= MAX_SESSIONS:
            reason = f"session limit reached: {MAX_SESSIONS} sessions are open"
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, reason)
        return ConsoleSession(self._console)

    # Called by the console

    @property
    def tunnels(self) -> list[Tunnel]:
        """The tunnels that this connection serves."""
        return self._tunnels_of({forward.side.key for forward in self.forwards if forward.side is not None})

    def drain(self) -> None:
        """The user quits: close its tunnels, and give the client time to disconnect, with exit status 0."""
        self._draining = True
        for tunnel in [forward.tunnel for forward in self.forwards if forward.tunnel is not None]:
            tunnel.close("closed by its owner")
        self.nursery.start_soon(self._wait_and_disconnect)

    async def _wait_and_disconnect(self) -> None:
        with trio.move_on_after(self._settings.patience):
            await self.closed.wait()
        self.disconnect("closed by the user")

    def disconnect(self, reason: str) -> None:
        """Send SSH_MSG_DISCONNECT and close the connection. Idempotent."""
        if not self.closed.is_set():
            self._disconnect_reason = reason
            self.connection.disconnect(asyncssh.DISC_BY_APPLICATION, reason)
            self.transport.abort()

    # Internals

    async def _open_forward(self, requested: tuple[str, int]) -> Forward:
        """A forward for one `-R`. Raises `TunneldError`."""
        login, _grant = self._authorize()
        if self._carrier is None or self.closed.is_set():
            raise NotAllowedError("the connection was lost")
        if len(self.forwards) >= self._settings.max_forwards:
            raise LimitReachedError(f"limit of -R reached: {len(self.forwards)} are open (ssh.max_forwards)")
        taken = {each.ordinal for each in self.forwards if each.requested == requested}
        ordinal = next(number for number in count(1) if number not in taken)
        forward = Forward(
            self._carrier, requested, ordinal, lambda: self._settings.max_channels, self._on_forward_closed
        )
        self.forwards.append(forward)
        try:
            if login.side is not None:
                self._join(login.side, forward)
            else:
                tunnel = await self._context.leases.take(login, self.requester, self._peer, forward)
                self._console.on_tunnel_opened(tunnel)
        except BaseException:
            self.forwards.remove(forward)
            raise
        if not requested[1]:
            forward.place = requested[0], forward.port
        if self.closed.is_set():
            forward.close("the connection was lost")
        return forward

    def _tunnels_of(self, keys: set[str]) -> list[Tunnel]:
        return [tunnel for key in keys if (tunnel := self.service.live.with_key(key)) is not None]

    def _join(self, side: SshServerSide, forward: Forward) -> None:
        """Let `forward` serve the tunnel that the user name is the key of. Raises `TunneldError`."""
        port = forward.place[1]
        if port not in {0, side.client_port}:
            raise UsageError(f"the tunnel of this key has port {side.client_port}, not {port}; use -R 0:HOST:PORT")
        if len(self.forwards) > 1:
            raise UsageError("a connection with a tunnel's key can have one -R, and there is one already")
        forward.join(side, self._peer, self._settings.max_carriers)
        for tunnel in self._tunnels_of({side.key}):
            self._console.on_tunnel_opened(tunnel)

    def _authorize(self) -> tuple[SshLogin, Grant | None]:
        """The login and its present grant, if any. Raises `NotAllowedError` if its credential was removed."""
        grant = self.login.grant(self._context.authenticator) if self.login is not None else None
        if self.login is None or (grant is None and self.login.side is None):
            raise NotAllowedError("the credential was removed")
        return self.login, grant

    def _on_forward_closed(self, forward: Forward, reason: str) -> None:
        """A forward ended. The last one ends the connection, unless the client cancelled it."""
        if forward in self.forwards:
            self.forwards.remove(forward)
        if self.closed.is_set():
            return
        if forward.tunnel is not None:
            reason = forward.tunnel.reason or reason
        self._console.on_tunnel_closed(forward.tunnel, reason)
        if not self.forwards and not forward.cancelled and not self._draining:
            self.disconnect(reason)

    def _on_lost(self, reason: str) -> None:
        """The transport has closed the socket."""
        connection = self.connection
        if connection.is_ending:
            error = connection.close_error
            reason = self._disconnect_reason or ("disconnected by the client" if error is None else str(error))
            self.broke_protocol = isinstance(error, asyncssh.DisconnectError)
        else:
            self.broke_protocol = reason == PREAUTH_BYTES_EXCEEDED
        has_disconnected = connection.is_ending and connection.close_error is None
        printable = (each if each.isprintable() else "?" for each in reason[:MAX_REASON_CHARACTERS])
        self.reason = reason = "".join(printable)
        self.closed.set()
        self._place.release()
        self.decided.set()
        if self._carrier is not None:
            self._carrier.on_lost(reason)
            self._log.info("ssh client disconnected", reason=reason)
        for forward in list(self.forwards):
            forward.close(reason)
            if has_disconnected and forward.tunnel is not None:
                forward.tunnel.close("the ssh client disconnected")

    def _on_unresponsive(self) -> None:
        self._log.info("ssh client does not answer")


class ForwardListener(asyncssh.SSHListener):
    """A forward as asyncssh knows it: its port, and how to cancel it."""

    def __init__(self, forward: Forward, is_lost: Callable[[], bool]) -> None:
        super().__init__()
        self._forward = forward
        self._is_lost = is_lost

    def get_port(self) -> int:
        """The public port."""
        return self._forward.port

    def close(self) -> None:
        """The client cancelled the forward, or its connection was closed, on which `SshConnection` decides."""
        if not self._is_lost():
            self._forward.cancel()
