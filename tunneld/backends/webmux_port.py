"""The shared port to which hidden servers connect their carriers.

serve_carriers
└─ ReloadableListener      accepts; see net/listeners.py

A new connection is a handshake under a deadline (auth/handshakes.py) until its peer names a server URI, which has the
key of an open tunnel. From then on it has no task: the tunnel's server side owns the carrier. A carrier of several
tunnels is owned by a `SharedCarrier`, see webmux_shared.py.
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
from tunneld.backends.webmux_shared import NO_SESSIONS, SharedCarrier
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
from tunneld.wire.webmux.header import FIRST_ATOM

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
            if not incoming.is_admitted:
                carrier.close("no server URI was defined")
        if incoming.refusal is not None:
            raise incoming.refusal
        if not incoming.is_admitted:
            kind = RemoteProtocolError if tls is not None or carrier.has_received else NothingReceivedError
            raise kind("the connection closed before a server URI was defined")


async def _shake_hands(connection: socket.socket, tls: ssl.SSLContext) -> TlsSocket:
    """Do the TLS handshake. Raises `NothingReceivedError` or OSError; the caller closes the connection then."""
    await trio.lowlevel.wait_readable(connection)
    if not connection.recv(1, socket.MSG_PEEK):
        raise NothingReceivedError("the connection closed before the TLS handshake")
    return await shake_hands(connection, tls, server_side=True)


class _IncomingCarrier:
    """The events of a carrier whose peer has sent no key yet. Implements `CarrierEvents`.

    A server URI that is defined as an endpoint makes it a carrier of that tunnel. An atom in a session that the peer
    opens makes it one of several tunnels, which `SharedCarrier` owns.
    """

    carrier: Carrier

    def __init__(self, registry: KeyRegistry, peer: Peer, max_carriers: int) -> None:
        self.is_admitted = False
        self.refusal: TunneldError | None = None  # None: the peer closed before it was admitted or refused
        self.decided = trio.Event()  # admitted, refused or closed
        self._registry = registry
        self._peer = peer
        self._max_carriers = max_carriers
        self._shared: SharedCarrier | None = None  # once the peer has opened a session for a tunnel

    def on_endpoint(self, uri: str | None) -> None:
        """The peer defined `uri`, which must have the key of an open tunnel."""
        try:
            side = find_side(self._registry, uri)
            side.admit(self.carrier, self._peer, self._max_carriers)
        except (NoSuchTunnelError, NotAllowedError, LimitReachedError) as error:
            self.refusal = error
            self.carrier.close("refused")  # before it replies to the ping behind this, which would confirm admission
        else:
            self.carrier.owner = _SoleCarrier(self.carrier, side, self._peer)
            self.carrier.turns.share = side.share(self.carrier.pump.budget)
            self.carrier.mark_authenticated()
            self._admit()
        self.decided.set()

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The peer opened a session for a tunnel. It may try other ones after a refusal, as far as its bytes and its
        time go: an agent with many tunnels cannot know which of them are open still.
        """
        if protocol < FIRST_ATOM:
            channel.reset(NO_SESSIONS)
            return
        if self._shared is None:
            self._shared = SharedCarrier(self.carrier, self._registry, self._peer, self._max_carriers)
        try:
            self._shared.admit(channel, protocol)
        except (NoSuchTunnelError, NotAllowedError, LimitReachedError) as error:
            self.refusal = error
            channel.reset(f"{error.code} {error}")
        else:
            self._admit()

    def _admit(self) -> None:
        self.is_admitted, self.refusal = True, None
        self.decided.set()
        log.debug("carrier connected", peer=format_peer(self._peer))

    def on_capacity(self) -> None:
        """Nothing: no visitor waits for a channel of this carrier."""

    def on_over(self, channel: Channel) -> None:
        """Nothing, as above."""

    def on_pong(self) -> None:
        """Nothing: the heartbeat has noted it."""

    def on_unresponsive(self) -> None:
        """Nothing: there is a deadline."""

    def on_closed(self, reason: str) -> None:
        """The carrier was closed or lost."""
        if reason == PREAUTH_EXCEEDED:
            self.refusal = NotAllowedError(reason)
        self.decided.set()


class _SoleCarrier:
    """The events of a carrier of one tunnel. Implements `CarrierEvents`."""

    def __init__(self, carrier: Carrier, side: WebMuxServerSide, peer: Peer) -> None:
        self.on_capacity = side.on_capacity
        self._carrier = carrier
        self._side = side
        self._peer = peer

    def on_endpoint(self, uri: str | None) -> None:
        """An endpoint without a key asks for no new visitors; other ones are ignored."""
        if is_keyless(uri):
            self._side.retire(self._carrier)

    def on_opened(self, channel: Channel, _protocol: int) -> None:
        """The peer opened a session, which a relay does not serve."""
        channel.reset(NO_SESSIONS)

    def on_over(self, _channel: Channel) -> None:
        """A channel is free."""
        self._side.on_capacity()

    def on_pong(self) -> None:
        """Nothing: the heartbeat has noted it."""

    def on_unresponsive(self) -> None:
        """The peer did not reply to a ping; the server side prefers other carriers from now on."""
        log.info("carrier does not answer", peer=format_peer(self._peer))

    def on_closed(self, reason: str) -> None:
        """The carrier was closed or lost."""
        self._side.on_carrier_closed(self._carrier)
        log.info("carrier closed", peer=format_peer(self._peer), reason=reason)


def is_keyless(uri: str | None) -> bool:
    """Whether a defined endpoint is a URI without a key, by which an agent asks for no new visitors."""
    try:
        return uri is not None and not Endpoint.parse(uri).key
    except UsageError:
        return False
