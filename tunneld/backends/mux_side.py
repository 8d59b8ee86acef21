"""The common part of the backends with carriers: each connection of the hidden server carries many visitors.

A visitor goes to the least loaded carrier with a free channel. When an agent's network fails, the agent reconnects
before the relay knows that the old carrier is dead. A new carrier therefore makes the relay ping the existing carriers,
and until they reply, visitors go to carriers that have.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from contextlib import suppress
from typing import ClassVar, Protocol

import trio

from tunneld.backends.queue import WaitQueue
from tunneld.config import schema
from tunneld.engine.budget import CostShare, TurnBudget
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint, Peer
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.server_side import BackendServices, ServerSideSnapshot, Takeover, TunnelContext
from tunneld.tunnel.tenants import Tenant

ENCRYPTED_SCHEMES = frozenset({"webmuxs", "ssh", "egtp"})
"""Schemes of shared ports that receive the key in encrypted form."""


class VisitorCarrier(Protocol):
    """A connection of the hidden server that carries channels, as `mux.carrier.Carrier` does."""

    @property
    def answering(self) -> bool:
        """False after the peer failed to reply to a ping."""

    @property
    def channels_left(self) -> int:
        """How many more channels can be opened, approximately."""

    @property
    def channels(self) -> Collection[int]:
        """The ids of the open channels."""

    @property
    def heartbeat(self) -> Heartbeat:
        """Tells whether the peer is alive."""

    def open(self, protocol: int) -> Channel:
        """Open a channel for a visitor of this port; the caller owns it. Raises `LimitReachedError` if it cannot."""

    def close(self, reason: str) -> None:
        """Close the connection and all of its channels. Idempotent."""


class MuxServerSide:
    """The carriers of one tunnel. Implements `ServerSide`; a subclass names its backend."""

    backend: ClassVar[str]

    def __init__(self, context: TunnelContext) -> None:
        """Choose a key."""
        self._context = context
        self._registry = self._port(context.services)
        self.key = self._choose_key()
        self._carriers: dict[VisitorCarrier, Peer] = {}  # each with its peer's address
        self._shared: frozenset[VisitorCarrier] = frozenset()  # those whose connection carries other tunnels, too
        self._accepting: list[VisitorCarrier] = []  # for new visitors; of equals, the newest is preferred
        self._queue = WaitQueue[Channel]()
        self._closed = False

    def start(self, _nursery: trio.Nursery) -> None:
        """See `ServerSide.start`. Carriers with its key are assigned to this tunnel from now on."""
        self._registry.register(self)

    def admit_agent(self, _options: TunnelOptions) -> None:
        """See `ServerSide.admit_agent`: any agent that has the key is permitted."""

    @property
    def takeover(self) -> Takeover:
        """See `ServerSide.takeover`."""
        return Takeover(key=self.key)

    @classmethod
    def check(cls, services: BackendServices, options: TunnelOptions) -> None:
        """See `Backend.check`."""
        cls._port(services).check(cls.backend)
        if options.secure == "yes" and not cls.is_encrypted(services, options):
            raise UsageError("option secure=yes requires a certificate, and this relay has none ([control.tls])")

    @classmethod
    def is_encrypted(cls, services: BackendServices, _options: TunnelOptions) -> bool:
        """See `Backend.is_encrypted`."""
        return cls._port(services).scheme(cls.backend) in ENCRYPTED_SCHEMES

    @classmethod
    def _port(cls, services: BackendServices) -> KeyRegistry:
        if services.keys is None:
            raise UsageError(f"this relay has no {cls.backend} backend")
        return services.keys

    @property
    def uri(self) -> Endpoint:
        """The server URI, with the key by which a carrier is assigned to this tunnel."""
        return self._registry.uri(self.backend, self._context.advertised_host, self.key)

    @property
    def parked(self) -> int:
        """How many more visitors the carriers can take."""
        return sum(carrier.channels_left for carrier in self._accepting)

    @property
    def connections(self) -> int:
        """See `ServerSide.connections`."""
        return len(self._carriers) - len(self._shared)

    @property
    def tenant(self) -> Tenant:
        """The tunnel's owner."""
        return self._context.tenant

    @property
    def live_connections(self) -> int:
        """How many carriers take visitors and reply to pings."""
        return sum(carrier.answering for carrier in self._accepting)

    @property
    def unresponsive(self) -> bool:
        """Whether there are carriers and none of them takes visitors and replies to pings."""
        return bool(self._carriers) and not self.live_connections

    @property
    def carriers(self) -> Collection[VisitorCarrier]:
        """All carriers."""
        return self._carriers.keys()

    @property
    def client_port(self) -> int:
        """The port that visitors connect to."""
        return self._context.client_port

    def share(self, budget: TurnBudget) -> CostShare:
        """The share of the pump's turns that all carriers of the tunnel's owner have together."""
        return self._context.tenant.share(budget)

    def dial_nowait(self) -> Channel:
        """A channel on the least loaded carrier; the caller owns it. Raises `trio.WouldBlock` if there is none."""
        if self._queue.waiters:
            raise trio.WouldBlock
        return self._open()

    async def dial(self) -> Channel:
        """Wait for a channel, which the caller then owns. Raises `trio.ClosedResourceError` once this is closed."""
        with suppress(trio.WouldBlock):
            return self.dial_nowait()
        return await self._queue.wait()

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """See `ServerSide.trim`. Always 0: no connections are parked."""
        return 0

    def pause(self) -> None:
        """See `ServerSide.pause`. Nothing: the owner of the shared port stops accepting."""

    def export(self) -> ServerSideSnapshot:
        """See `ServerSide.export`. Closes the carriers: their send buffers and TLS state are in this process, and the
        hidden server reconnects to the same address.
        """
        self._closed = True
        for carrier in list(self._carriers):
            carrier.close("the relay is restarting")
        return ServerSideSnapshot(key=self.key, scheme=self._registry.scheme(self.backend))

    def close(self) -> None:
        """Admit no carriers, close idle ones, and close the remaining ones when their last visitor has left.
        Idempotent.
        """
        self._closed = True
        self._registry.unregister(self)
        self._close_idle()
        self._queue.close()

    def admit(self, carrier: VisitorCarrier, peer: Peer, limit: int) -> None:
        """Add a carrier that has authenticated with this tunnel's key. Raises as `check_admissible`; the carrier stays
        the caller's then.
        """
        self.check_admissible(peer, limit)
        self.add(carrier, peer)

    def check_admissible(self, peer: Peer, limit: int, *, is_counted: bool = False) -> None:
        """Raise `NotAllowedError` or `LimitReachedError` where a further carrier may not be added: the tunnel has
        `limit` already, or its owner may have no further connection. `is_counted`: the connection carries other
        tunnels of the owner, too, and is no further one.
        """
        self.check_peer(peer)
        context = self._context
        counted = is_counted and context.persist
        limit = min(limit, context.settings.max_parked if counted else context.parking_capacity())
        if len(self._carriers) >= limit and not self._replace_unresponsive():
            raise LimitReachedError(
                f"connection limit reached: the tunnel has {len(self._carriers)} server connections (max_carriers)"
            )

    def add(self, carrier: VisitorCarrier, peer: Peer, *, is_counted: bool = False) -> None:
        """Add a carrier after `check_admissible`."""
        for other in list(self._carriers):  # a ping may find that a carrier is lost, and remove it
            other.heartbeat.ping_now()
        self._carriers[carrier] = peer
        if is_counted:
            self._shared |= {carrier}
        self._accepting.insert(0, carrier)
        self._context.on_attached(peer)
        self.on_capacity()

    def check_peer(self, peer: Peer) -> None:
        """Raise `NotAllowedError` where the hidden server may not connect from this address."""
        if reason := self._context.why_not_allowed(peer):
            raise NotAllowedError(reason)

    def retire(self, carrier: VisitorCarrier) -> None:
        """Send no new visitors to this carrier, as its peer requested; its present visitors finish. Idempotent."""
        if carrier in self._accepting:
            self._accepting.remove(carrier)

    # Called by carriers

    def on_capacity(self) -> None:
        """A carrier may have a free channel: serve the visitors that wait, oldest first."""
        if self._closed:
            self._close_idle()
        while self._queue.waiters and self._serve_first():
            pass

    def on_idle(self) -> None:
        """A carrier has lost its last visitor: if the tunnel has closed, so does the carrier."""
        if self._closed:
            self._close_idle()

    def serve_next(self) -> bool:
        """Serve the visitor that has waited longest, if there is a channel for it. Returns whether others wait."""
        return bool(self._queue.waiters) and self._serve_first() and bool(self._queue.waiters)

    def on_carrier_closed(self, carrier: VisitorCarrier) -> None:
        """A carrier was closed or lost: remove it."""
        self.retire(carrier)
        self._shared -= {carrier}
        peer = self._carriers.pop(carrier, None)
        if peer is not None:
            self._context.on_detached(peer)

    # Internals

    def _choose_key(self) -> str:
        """The key in the server URI, by which the registry finds this server side."""
        known, scheme = _known_key(self._context, self._registry.scheme(self.backend))
        return self._registry.choose(self.backend, known, scheme, self._context.takeover.key)

    def _close_idle(self) -> None:
        for carrier in list(self._carriers):
            if not carrier.channels:
                carrier.close("the tunnel closed")

    def _serve_first(self) -> bool:
        """Serve the first visitor that waits; returns False if there is no channel for it."""
        try:
            channel = self._open()
        except trio.WouldBlock:
            return False
        self._queue.serve(channel)
        return True

    def _open(self) -> Channel:
        carriers = self._accepting
        for carrier in carriers[:] if len(carriers) < 2 else sorted(carriers, key=_rank):
            try:
                return carrier.open(self._context.client_port)
            except LimitReachedError:
                pass
        raise trio.WouldBlock

    def _replace_unresponsive(self) -> bool:
        """Close one unresponsive carrier, to make room for a new one; False if there is none."""
        for carrier in self._carriers:
            if not carrier.answering:
                carrier.close("replaced by a new connection because it did not answer")
                return True
        return False


def carrier_limits(
    settings: schema.WebMuxSettings | schema.SshSettings | schema.EgtpSettings, memory: int
) -> CarrierLimits:
    """The limits of a carrier, from its port's table of the configuration; `memory` is in bytes."""
    return CarrierLimits(
        heartbeat=settings.heartbeat,
        patience=min(settings.patience, settings.heartbeat),
        max_window=settings.max_window,
        window_budget=memory,
    )


def _known_key(context: TunnelContext, scheme: str) -> tuple[str, str]:
    """The key that the hidden server may know already, and the scheme of its server URI; empty if there is none.

    `scheme` is the present one, which a snapshot of an earlier version does not name.
    """
    if context.snapshot is not None:
        return context.snapshot.key, context.snapshot.scheme or scheme
    return (context.former.key, context.former.scheme) if context.former is not None else ("", "")


def _rank(carrier: VisitorCarrier) -> tuple[bool, bool, int]:
    """Sort key: prefer carriers that reply, then carriers without an unanswered ping, then fewer channels."""
    return (
        not carrier.answering,
        carrier.heartbeat.awaiting_reply and not carrier.heartbeat.received,
        len(carrier.channels),
    )
