"""The shared port to which hidden servers connect their carriers.

serve_carriers
├─ door                    see doors.py
└─ newcomer ×N             a task until it has named its endpoint: TLS and the definition under one deadline

A newcomer is a stranger, counted and penalised with those of the control port: its proof is the key in the server URI
that it defines. From then on it has no task; its tunnel's server side owns the carrier.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable
from typing import Any

import structlog
import trio

from tunneld import net
from tunneld.backends.webmux import Endpoints, WebMux
from tunneld.config import schema
from tunneld.control.gate import Gate
from tunneld.control.strangers import Refusal, Stranger
from tunneld.doors import Door
from tunneld.endpoint import format_peer, unmap
from tunneld.errors import LimitReachedError, NotAllowedError, reason_of
from tunneld.relay.pump import Pump
from tunneld.session import Carrier, CarrierLimits, Channel, Link

log: structlog.stdlib.BoundLogger = structlog.get_logger("webmux")


async def serve_carriers(
    door: Door,
    settings: Callable[[], schema.WebMux],
    tls: Callable[[], ssl.SSLContext | None],
    endpoints: Endpoints,
    engine: Pump,
    gate: Gate,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve carriers to all who come through `door` until cancelled. `settings` is asked anew for each newcomer, `tls`
    for each handshake. Whoever exchanges the door's listeners tells `endpoints`.
    """
    async with trio.open_nursery() as nursery:
        lobby = _Lobby(settings, tls, endpoints, engine, gate, nursery)
        endpoints.listen(door.port, secure=tls() is not None)
        await nursery.start(door.serve, lobby.arrive)
        task_status.started()


class _Lobby:
    """Where newcomers wait until it is known whose they are."""

    def __init__(
        self,
        settings: Callable[[], schema.WebMux],
        tls: Callable[[], ssl.SSLContext | None],
        endpoints: Endpoints,
        engine: Pump,
        gate: Gate,
        nursery: trio.Nursery,
    ) -> None:
        self._settings = settings
        self._tls = tls
        self._endpoints = endpoints
        self._engine = engine
        self._gate = gate
        self._nursery = nursery

    def arrive(self, connection: socket.socket, peer: Any) -> None:
        """Somebody connected: is there a place for a stranger?"""
        host = unmap(peer[0])
        stranger = self._gate.strangers.come(host, trio.current_time(), random.random())
        if isinstance(stranger, Refusal):
            connection.close()
            self._gate.tell_refusal(host, "webmux", stranger)
        else:
            self._nursery.start_soon(self._welcome, connection, peer, stranger)

    async def _welcome(self, connection: socket.socket, peer: Any, stranger: Stranger) -> None:
        """One newcomer, until its tunnel has it or it is gone."""
        settings = self._settings()
        try:
            with trio.move_on_after(settings.handshake_timeout) as scope:
                context = self._tls()
                if context is not None:
                    connection = await net.shake_hands(connection, context, server_side=True)
                newcomer = _Newcomer(self._endpoints, peer)
                newcomer.carrier = carrier = Carrier(
                    self._engine, Link(connection), newcomer, initiator=False, limits=limits_of(settings)
                )
                try:
                    await newcomer.decided.wait()
                finally:
                    if newcomer.side is None:
                        carrier.close("it named no endpoint")
            if scope.cancelled_caught:
                self._reject(peer, stranger, f"no endpoint was defined in {settings.handshake_timeout:g} s")
            elif newcomer.refusal:
                self._reject(peer, stranger, newcomer.refusal)
        except OSError as error:
            connection.close()
            self._reject(peer, stranger, reason_of(error))
        finally:
            stranger.end()

    def _reject(self, peer: Any, stranger: Stranger, reason: str) -> None:
        stranger.fail(trio.current_time())
        log.info("carrier refused", peer=format_peer(peer), reason=reason)


class _Newcomer:
    """The owner of a carrier: first nobody's, then of a server side. See `session.Owner`."""

    carrier: Carrier

    def __init__(self, endpoints: Endpoints, peer: Any) -> None:
        self.side: WebMux | None = None
        self.refusal = ""  # empty where it left by itself
        self.decided = trio.Event()
        self._endpoints = endpoints
        self._peer = peer

    def defined(self, uri: str | None) -> None:
        """Whose is it? Once that is known, nothing it defines matters."""
        if self.side is not None:
            return
        try:
            side = self._endpoints.find(uri)
            side.admit(self.carrier, self._peer)
        except (NotAllowedError, LimitReachedError) as error:
            self.refusal = str(error)
        else:
            self.side = side
            log.debug("carrier came", peer=format_peer(self._peer))
        self.decided.set()

    def opened(self, channel: Channel, protocol: int) -> None:
        """The hidden server calls us: there is nothing to reach here."""
        channel.reset("this relay opens sessions and serves none")

    def freed(self) -> None:
        """A channel ended."""
        if self.side is not None:
            self.side.freed()

    def answered(self) -> None:
        """It is alive."""

    def silent(self) -> None:
        """It does not answer; visitors prefer others."""
        log.info("carrier does not answer", peer=format_peer(self._peer))

    def ended(self, reason: str) -> None:
        """It is gone."""
        self.decided.set()
        if self.side is not None:
            self.side.lost(self.carrier)
            log.info("carrier ended", peer=format_peer(self._peer), reason=reason)


def limits_of(settings: schema.WebMux) -> CarrierLimits:
    """The carrier's share of the configuration."""
    return CarrierLimits(
        heartbeat=settings.heartbeat,
        patience=min(settings.patience, settings.heartbeat),
        max_window=settings.max_window,
        memory=settings.carrier_memory,
    )
