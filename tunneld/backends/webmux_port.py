"""The shared port to which hidden servers connect their carriers.

serve_carriers
└─ door                    see doors.py

A newcomer waits in the lobby until it has named its endpoint: its proof is the key in the server URI that it defines.
From then on it has no task; its tunnel's server side owns the carrier.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
import trio

from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends.webmux import WebMuxServerSide, find_side
from tunneld.config import schema
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, NoSuchTunnelError, NotAllowedError, TunneldError, UsageError
from tunneld.mux.carrier import PREAUTH_EXCEEDED, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint, format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.connection import shake_hands
from tunneld.tunnel.keys import KeyRegistry

log: structlog.stdlib.BoundLogger = structlog.get_logger("webmux")


async def serve_carriers(
    door: ReloadableListener,
    settings: Callable[[], schema.WebMuxSettings],
    lobby: HandshakeSupervisor,
    endpoints: KeyRegistry,
    engine: Pump,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve carriers to all who come through `door` until cancelled. `settings` is asked anew for each newcomer.
    Whoever exchanges the door's listeners tells `endpoints`.
    """
    port = _WebMuxPort(settings, lobby, endpoints, engine)
    endpoints.set_port("webmux", "webmuxs" if lobby.tls else "webmux", door.port)
    await door.serve(port.on_connection, task_status=task_status)


class _WebMuxPort:
    """The shared port."""

    def __init__(
        self,
        settings: Callable[[], schema.WebMuxSettings],
        lobby: HandshakeSupervisor,
        endpoints: KeyRegistry,
        engine: Pump,
    ) -> None:
        self._settings = settings
        self._lobby = lobby
        self._endpoints = endpoints
        self._engine = engine

    def on_connection(self, connection: socket.socket, peer: Any) -> None:
        """Somebody connected."""
        timeout = self._settings().handshake_timeout
        self._lobby.start(connection, peer, "webmux", partial(self._hear_out, connection, peer), timeout)

    async def _hear_out(self, connection: socket.socket, peer: Any) -> None:
        """See `handshakes.Handshake`: one newcomer, until its tunnel has it or it is gone."""
        context = self._lobby.tls
        try:
            way = await shake_hands(connection, context, server_side=True) if context else connection
            settings = self._settings()
            newcomer = _IncomingCarrier(self._endpoints, peer, settings.max_carriers)
            limits = carrier_limits(settings)
            newcomer.carrier = carrier = Carrier(
                self._engine, connection_over(way), newcomer, initiator=False, limits=limits, is_strange=True
            )
        except BaseException:
            connection.close()
            raise
        try:
            await newcomer.decided.wait()
        finally:
            if newcomer.side is None:
                carrier.close("it named no endpoint")
        if newcomer.refusal is not None:
            raise newcomer.refusal


class _IncomingCarrier:
    """The owner of a carrier: first nobody's, then of a server side. See `session.Owner`."""

    carrier: Carrier

    def __init__(self, endpoints: KeyRegistry, peer: Any, max_carriers: int) -> None:
        self.side: WebMuxServerSide | None = None
        self.refusal: TunneldError | None = None  # None where it left by itself
        self.decided = trio.Event()
        self.on_capacity: Callable[[], None] = _not_yet  # told after each channel: nothing stands in between
        self._endpoints = endpoints
        self._peer = peer
        self._max_carriers = max_carriers

    def on_endpoint(self, uri: str | None) -> None:
        """Whose is it? Once that is known, an endpoint without a key means that it is to be called no more; nothing
        else that it defines matters.
        """
        if self.side is not None:
            if is_farewell(uri):
                self.side.retire(self.carrier)
            return
        try:
            side = find_side(self._endpoints, uri)
            side.admit(self.carrier, self._peer, self._max_carriers)
        except (NoSuchTunnelError, NotAllowedError, LimitReachedError) as error:
            self.refusal = error
            self.carrier.close("refused")  # before it answers the question behind this, which says that it was taken
        else:
            self.side, self.on_capacity = side, side.on_capacity
            self.carrier.mark_authenticated()
            log.debug("carrier came", peer=format_peer(self._peer))
        self.decided.set()

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The hidden server calls us: there is nothing to reach here."""
        channel.reset("this relay opens sessions and serves none")

    def on_pong(self) -> None:
        """It is alive."""

    def on_unresponsive(self) -> None:
        """It does not answer; visitors prefer others."""
        log.info("carrier does not answer", peer=format_peer(self._peer))

    def on_closed(self, reason: str) -> None:
        """It is gone."""
        if self.side is None and reason == PREAUTH_EXCEEDED:
            self.refusal = NotAllowedError(reason)
        self.decided.set()
        if self.side is not None:
            self.side.on_carrier_closed(self.carrier)
            log.info("carrier ended", peer=format_peer(self._peer), reason=reason)


def _not_yet() -> None:
    """Nobody waits for a channel of a carrier that is nobody's."""


def is_farewell(uri: str | None) -> bool:
    """Whether an endpoint names no tunnel."""
    try:
        return uri is not None and not Endpoint.parse(uri).key
    except UsageError:
        return False


def carrier_limits(settings: schema.WebMuxSettings) -> CarrierLimits:
    """The carrier's share of the configuration."""
    return CarrierLimits(
        heartbeat=settings.heartbeat,
        patience=min(settings.patience, settings.heartbeat),
        max_window=settings.max_window,
        memory=settings.carrier_memory,
    )
