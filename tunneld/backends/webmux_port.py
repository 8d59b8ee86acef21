"""The shared port to which hidden servers connect their carriers.

serve_carriers
└─ ReloadableListener      accepts; see net/listeners.py

A new connection is a handshake under a deadline (auth/handshakes.py) until its peer defines a server URI, which has the
key of an open tunnel. From then on it has no task: the tunnel's server side owns the carrier.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from functools import partial

import structlog
import trio

from tunneld.auth.handshakes import HandshakeSupervisor, NothingReceivedError
from tunneld.backends.mux_side import carrier_limits
from tunneld.backends.webmux import WebMuxServerSide, find_side
from tunneld.config import schema
from tunneld.engine.pump import Pump
from tunneld.errors import (
    LimitReachedError,
    NoSuchTunnelError,
    NotAllowedError,
    RemoteProtocolError,
    TunneldError,
    UsageError,
)
from tunneld.mux.carrier import PREAUTH_EXCEEDED, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.net.endpoint import Endpoint, Peer, format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.connection import TlsSocket, shake_hands
from tunneld.tunnel.keys import KeyRegistry

log: structlog.stdlib.BoundLogger = structlog.get_logger("webmux")


async def serve_carriers(
    listener: ReloadableListener,
    settings: Callable[[], schema.WebMuxSettings],
    handshakes: HandshakeSupervisor,
    registry: KeyRegistry,
    engine: Pump,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept carriers until cancelled; the daemon runs this. `settings` is called for each new connection. A caller
    that rebinds the listener must update `registry`.
    """
    port = _WebMuxPort(settings, handshakes, registry, engine)
    registry.set_port("webmux", "webmuxs" if handshakes.tls else "webmux", listener.port)
    await listener.serve(port.on_connection, task_status=task_status)


class _WebMuxPort:
    """The shared port."""

    def __init__(
        self,
        settings: Callable[[], schema.WebMuxSettings],
        handshakes: HandshakeSupervisor,
        registry: KeyRegistry,
        engine: Pump,
    ) -> None:
        self._settings = settings
        self._handshakes = handshakes
        self._registry = registry
        self._engine = engine

    def on_connection(self, connection: socket.socket, peer: Peer) -> None:
        """The listener accepted a connection: start its handshake."""
        timeout = self._settings().handshake_timeout
        self._handshakes.start(connection, peer, "webmux", partial(self._handshake, connection, peer), timeout)

    async def _handshake(self, connection: socket.socket, peer: Peer) -> None:
        """Do the TLS handshake, if the relay has a certificate, and wait until a server side owns the carrier. Raises
        OSError or a `TunneldError` if none will; the connection is closed then.
        """
        tls = self._handshakes.tls
        try:
            transport = await _shake_hands(connection, tls) if tls else connection
            settings = self._settings()
            incoming = _IncomingCarrier(self._registry, peer, settings.max_carriers)
            limits = carrier_limits(settings, settings.carrier_memory)
            incoming.carrier = carrier = Carrier(
                self._engine, connection_over(transport), incoming, initiator=False, limits=limits, authenticated=False
            )
        except BaseException:
            connection.close()
            raise
        try:
            await incoming.decided.wait()
        finally:
            if incoming.side is None:
                carrier.close("no server URI was defined")
        if incoming.refusal is not None:
            raise incoming.refusal
        if incoming.side is None:
            kind = RemoteProtocolError if tls is not None or carrier.has_received else NothingReceivedError
            raise kind("the connection closed before a server URI was defined")


async def _shake_hands(connection: socket.socket, tls: ssl.SSLContext) -> TlsSocket:
    """Do the TLS handshake. Raises `NothingReceivedError` or OSError; the caller closes the connection then."""
    await trio.lowlevel.wait_readable(connection)
    if not connection.recv(1, socket.MSG_PEEK):
        raise NothingReceivedError("the connection closed before the TLS handshake")
    return await shake_hands(connection, tls, server_side=True)


class _IncomingCarrier:
    """The events of a carrier. It belongs to a server side once its peer has sent a key. Implements `CarrierEvents`."""

    carrier: Carrier

    def __init__(self, registry: KeyRegistry, peer: Peer, max_carriers: int) -> None:
        self.side: WebMuxServerSide | None = None
        self.refusal: TunneldError | None = None  # None: the peer closed before it was admitted or refused
        self.decided = trio.Event()  # admitted, refused or closed
        self.on_capacity: Callable[[], None] = _ignore_capacity  # the server side's own method once there is one
        self._registry = registry
        self._peer = peer
        self._max_carriers = max_carriers

    def on_endpoint(self, uri: str | None) -> None:
        """The peer defined `uri`. The first one must have the key of an open tunnel; after that, one without a key
        asks for no new visitors, and other ones are ignored.
        """
        if self.side is not None:
            if is_keyless(uri):
                self.side.retire(self.carrier)
            return
        try:
            side = find_side(self._registry, uri)
            side.admit(self.carrier, self._peer, self._max_carriers)
        except (NoSuchTunnelError, NotAllowedError, LimitReachedError) as error:
            self.refusal = error
            self.carrier.close("refused")  # before it replies to the ping behind this, which would confirm admission
        else:
            self.side, self.on_capacity = side, side.on_capacity
            self.carrier.turns.share = side.share(self.carrier.pump.budget)
            self.carrier.mark_authenticated()
            log.debug("carrier connected", peer=format_peer(self._peer))
        self.decided.set()

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a session, which a relay does not serve."""
        channel.reset("this relay does not accept sessions")

    def on_pong(self) -> None:
        """Nothing: the heartbeat has noted it."""

    def on_unresponsive(self) -> None:
        """The peer did not reply to a ping; the server side, if it has one, prefers other carriers from now on."""
        if self.side is not None:
            log.info("carrier does not answer", peer=format_peer(self._peer))

    def on_closed(self, reason: str) -> None:
        """The carrier was closed or lost."""
        if self.side is None and reason == PREAUTH_EXCEEDED:
            self.refusal = NotAllowedError(reason)
        self.decided.set()
        if self.side is not None:
            self.side.on_carrier_closed(self.carrier)
            log.info("carrier closed", peer=format_peer(self._peer), reason=reason)


def _ignore_capacity() -> None:
    """Nothing: no visitor waits for a channel of a carrier without a server side."""


def is_keyless(uri: str | None) -> bool:
    """Whether a defined endpoint is a URI without a key, by which an agent asks for no new visitors."""
    try:
        return uri is not None and not Endpoint.parse(uri).key
    except UsageError:
        return False
