"""One client's connection, from its coming to its end.

come ──► transport, connection: key exchange and login, under the port's deadline
enter    its carrier; from now on it may forward, and has sessions
leave    its forwards are over: their tunnels close, if it said good-bye, or wait for it to come back
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import asyncssh
import structlog
import trio

from tunneld.auth.authenticator import Authenticator
from tunneld.backends.ssh.carrier import SshCarrier
from tunneld.backends.ssh.console import MAX_SESSIONS, Console, ConsoleSession
from tunneld.backends.ssh.fast import FastConnection
from tunneld.backends.ssh.forwards import Forward, Leases
from tunneld.backends.ssh.login import SshAuthenticator, SshLogin
from tunneld.backends.ssh.loop import TrioEventLoop
from tunneld.backends.ssh.server import SshServer
from tunneld.backends.ssh.side import SshServerSide
from tunneld.backends.ssh.transport import PREAUTH_EXCEEDED, SshTransport
from tunneld.config import schema
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, NotAllowedError, TunneldError, UsageError
from tunneld.mux.connection import Connection
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import format_peer, unmap
from tunneld.tunnel.tunnel import Tunnel

log: structlog.stdlib.BoundLogger = structlog.get_logger("ssh")

MAX_REFUSALS = 100
"""Of one connection: more than a person's mistakes, and each is a line in the log."""
LONGEST_REASON = 200
"""Characters of a reason in the log that the peer may have had a part in."""


@dataclass(frozen=True, slots=True)
class SshServerContext:
    """What all guests share."""

    settings: Callable[[], schema.SshSettings]
    service: TunnelService
    authenticator: Authenticator
    ssh_authenticator: SshAuthenticator
    leases: Leases
    pump: Pump
    loop: TrioEventLoop
    options: Callable[[], asyncssh.SSHServerConnectionOptions]


class SshConnection:
    """Whoever has one connection; see `server.Guest`."""

    def __init__(self, house: SshServerContext, bare: socket.socket, peer: Any) -> None:
        """Nothing is said before `come`."""
        self.login: SshLogin | None = None
        self.forwards: list[Forward] = []
        self.decided = trio.Event()  # it is known, or gone
        self.gone = trio.Event()
        self.reason = ""  # why it is gone
        self.strange = False  # it spoke what is no SSH of ours
        self.nursery: trio.Nursery  # of what its sessions show
        self._house = house
        self._peer = peer
        self._settings = house.settings()
        self._limits = connection_limits(self._settings)
        self._conversation = Console(self)
        self._refusals = 0
        self._carrier: SshCarrier | None = None
        self._seen_off = False
        self._good_bye = ""  # that we said
        self._log = log.bind(peer=format_peer(peer))
        self.connection = connection = FastConnection(house.loop, house.options())
        self.transport = connection.transport = SshTransport(
            house.pump, Connection(bare), connection, self._limits, self._lost
        )
        connection._protocol_factory = lambda: SshServer(house.ssh_authenticator, self, self._banner)

    def start(self) -> None:
        """Begin to speak. Raises OSError where it left already."""
        self.connection.connection_made(self.transport)
        self.transport.start()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own what its sessions show until it is gone. Cancelling this ends it."""
        try:
            async with trio.open_nursery() as self.nursery:
                task_status.started()
                await self.gone.wait()
                self.nursery.cancel_scope.cancel()
        finally:
            self.transport.end("the relay stopped")

    @property
    def failures(self) -> int:
        """Proofs that were wrong."""
        return self.connection.failures

    @property
    def service(self) -> TunnelService:
        """The tunnels."""
        return self._house.service

    @property
    def asker(self) -> Requester:
        """As whom it opens tunnels."""
        login, grant = self._known()
        owner = login.owner or format_peer(self._peer)
        local = unmap(self.transport.get_extra_info("sockname")[0])
        return Requester(unmap(self._peer[0]), owner, local, grant)

    # What `server` tells and asks

    def on_login(self, login: SshLogin) -> None:
        """It is known."""
        self.login = login
        self.transport.mark_authenticated()
        dial_timeout = self._settings.dial_timeout
        self._carrier = SshCarrier(self.connection, self.transport, self._limits, dial_timeout, self._fell_silent)
        self._log = self._log.bind(credential=login.owner) if login.owner else self._log
        self._log.info("ssh came", user=login.user if login.side is None else "(a tunnel's key)")
        self.decided.set()

    async def listen(self, host: str, port: int) -> asyncssh.SSHListener | bool:
        """`-R host:port:...`."""
        try:
            forward = await self._house.loop.trio_as_future(self._open, (host, port))
        except TunneldError as error:
            self.refuse(str(error))
            return False
        self.connection.follow = forward.begin
        return ForwardListener(forward)

    def refuse(self, reason: str) -> None:
        """Say it where it can be seen: in its session, or, with `ssh -v`, where there is none."""
        self._refusals += 1
        self._log.info("-R refused", reason=reason)
        self._conversation.complain(reason)
        if not self.gone.is_set():
            self.connection.send_debug(reason, always_display=True)
        if self._refusals >= MAX_REFUSALS:
            self.hang_up(f"{MAX_REFUSALS} forwards were refused")

    def session(self) -> asyncssh.SSHServerSession[str]:
        """A shell, or a word."""
        if self._conversation.sessions >= MAX_SESSIONS:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, f"{MAX_SESSIONS} sessions are open")
        return ConsoleSession(self._conversation)

    # What its conversation asks

    @property
    def tunnels(self) -> list[Tunnel]:
        """Those that are served by this connection."""
        return self._tunnels_of({forward.side.key for forward in self.forwards if forward.side is not None})

    def drain(self) -> None:
        """The person wants no more: its tunnels close, and the client may go by itself, which is no failure to it."""
        self._seen_off = True
        for tunnel in [forward.tunnel for forward in self.forwards if forward.tunnel is not None]:
            tunnel.close("its owner has ended it")
        self.nursery.start_soon(self._wait_and_hang_up)

    async def _wait_and_hang_up(self) -> None:
        with trio.move_on_after(self._settings.patience):
            await self.gone.wait()
        self.hang_up("it was ended")

    def hang_up(self, reason: str) -> None:
        """Say good-bye."""
        if not self.gone.is_set():
            self._good_bye = reason
            self.connection.disconnect(asyncssh.DISC_BY_APPLICATION, reason)
            self.transport.abort()

    # Inside

    async def _open(self, place: tuple[str, int]) -> Forward:
        """A forward for one `-R`. Raises `TunneldError`."""
        login, grant = self._known()
        if self._carrier is None or self.gone.is_set():
            raise NotAllowedError("the connection is gone")
        if len(self.forwards) >= self._settings.max_forwards:
            raise LimitReachedError(f"{len(self.forwards)} are forwarded already (ssh.max_forwards)")
        taken = {each.ordinal for each in self.forwards if each.wish == place}
        ordinal = next(number for number in count(1) if number not in taken)
        forward = Forward(self._carrier, place, ordinal, lambda: self._settings.max_channels, self._closed)
        self.forwards.append(forward)
        try:
            if login.side is not None:
                self._join(login.side, forward)
            else:
                asker = self.asker
                tunnel = await self._house.leases.take(login, grant, asker, self._peer, forward)
                self._conversation.opened(tunnel)
        except BaseException:
            self.forwards.remove(forward)
            raise
        if not place[1]:
            forward.place = place[0], forward.port
        if self.gone.is_set():
            forward.close("the connection is gone")
        return forward

    def _tunnels_of(self, keys: set[str]) -> list[Tunnel]:
        return [tunnel for tunnel in self.service.tunnels() if tunnel.server_uri.key in keys]

    def _join(self, side: SshServerSide, forward: Forward) -> None:
        """A place on the tunnel whose key was said."""
        port = forward.place[1]
        if port not in {0, side.client_port}:
            raise UsageError(f"the tunnel of this key has port {side.client_port}, not {port}: say -R 0:...")
        if len(self.forwards) > 1:
            raise UsageError("one -R for the key of a tunnel, and it is forwarded already")
        forward.join(side, self._peer, self._settings.max_carriers)
        for tunnel in self._tunnels_of({side.key}):
            self._conversation.opened(tunnel)

    def _known(self) -> tuple[SshLogin, Any]:
        grant = self.login.grant(self._house.authenticator) if self.login is not None else None
        if self.login is None or (grant is None and self.login.side is None):
            raise NotAllowedError("the credential is gone")
        return self.login, grant

    def _closed(self, forward: Forward, reason: str) -> None:
        """A forward is over; with the last of them, so is the connection, unless the client ended it."""
        if forward in self.forwards:
            self.forwards.remove(forward)
        if self.gone.is_set():
            return
        if forward.tunnel is not None:
            reason = forward.tunnel.reason or reason
        self._conversation.closed(forward.tunnel, reason)
        if not self.forwards and not forward.cancelled and not self._seen_off:
            self.hang_up(reason)

    def _lost(self, reason: str) -> None:
        """The socket is closed."""
        connection = self.connection
        if connection.is_ending:
            error = connection.farewell
            reason = self._good_bye or ("it said good-bye" if error is None else str(error))
            self.strange = isinstance(error, asyncssh.DisconnectError)
        else:
            self.strange = reason == PREAUTH_EXCEEDED
            connection.connection_lost(asyncssh.ConnectionLost(reason))
        is_polite = connection.is_ending and connection.farewell is None
        self.reason = reason = "".join(each if each.isprintable() else "?" for each in reason[:LONGEST_REASON])
        self.gone.set()
        self.decided.set()
        if self._carrier is not None:
            self._carrier.lose(reason)
            self._log.info("ssh left", reason=reason)
        for forward in list(self.forwards):
            forward.close(reason)
            if is_polite and forward.tunnel is not None:
                forward.tunnel.close("its ssh said good-bye")

    def _fell_silent(self) -> None:
        self._log.info("ssh does not answer")

    def _banner(self, user: str) -> str:
        return ""


class ForwardListener(asyncssh.SSHListener):
    """What asyncssh keeps of a forward: its port, and how to end it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward

    def get_port(self) -> int:
        """The port that visitors reach."""
        return self._forward.port

    def close(self) -> None:
        """The client wants it no more."""
        self._forward.cancel()


def connection_limits(settings: schema.SshSettings) -> CarrierLimits:
    """The connection's share of the configuration."""
    return CarrierLimits(
        heartbeat=settings.heartbeat,
        patience=min(settings.patience, settings.heartbeat),
        max_window=settings.max_window,
        memory=settings.connection_memory,
    )
