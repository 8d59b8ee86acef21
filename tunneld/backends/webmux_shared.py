"""A carrier that several tunnels share: an agent with many exposures needs one connection, not one for each.

    SharedCarrier            one connection, for tunnels of one owner
    └─ CarriedTunnel ×N      one of them; to its server side it is a carrier of its own

The agent opens a WebMUX session for each tunnel, with the server URI, as an atom, in place of the port. While that
session is open, the relay opens sessions for the tunnel's visitors, with the same atom. If the agent ends it (FIN), no
further visitors come; the relay ends its direction with the last of them. The relay resets it, with the reason, where
it would close a connection that has one tunnel: so nothing that happens to one tunnel concerns the others.

All share the channels of the carrier. Where none is free, visitors wait, and the tunnels take turns.
"""

from __future__ import annotations

from typing import Final

from tunneld.backends.mux_side import MuxServerSide
from tunneld.backends.webmux import find_side
from tunneld.errors import LimitReachedError, NotAllowedError, TunneldError
from tunneld.log import Logger
from tunneld.mux.carrier import Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.net.endpoint import Peer, format_peer
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tenants import Tenant
from tunneld.wire.webmux.header import FIRST_ATOM

NO_SESSIONS: Final = "this relay does not accept sessions"

log = Logger("webmux")


class CarriedTunnel:
    """One tunnel on a carrier. Implements `VisitorCarrier`, and `EndHandler` for the session that stands for it."""

    __slots__ = ("_owner", "_protocol", "_session", "carrier", "channels", "over", "retired", "side")

    def __init__(self, owner: SharedCarrier, side: MuxServerSide, session: Channel, protocol: int) -> None:
        """`protocol` is the id of the atom."""
        self.side = side
        self.channels: dict[int, Channel] = {}  # of visitors, by session id
        self.retired = False  # the agent wants no more visitors
        self.over = False
        self._owner = owner
        self.carrier = owner.carrier
        self._session = session
        self._protocol = protocol

    # As a carrier, for the server side

    @property
    def answering(self) -> bool:
        """See `VisitorCarrier.answering`."""
        return self.carrier.answering

    @property
    def channels_left(self) -> int:
        """See `VisitorCarrier.channels_left`: what all tunnels of the carrier together have left."""
        return self.carrier.channels_left

    @property
    def heartbeat(self) -> Heartbeat:
        """That of the carrier."""
        return self.carrier.heartbeat

    def open(self, _port: int) -> Channel:
        """See `VisitorCarrier.open`."""
        try:
            channel = self.carrier.open(self._protocol)
        except LimitReachedError:
            self._owner.starved[self] = None
            raise
        self.channels[channel.sid] = channel
        self._owner.tunnel_of[channel.sid] = self
        return channel

    def close(self, reason: str) -> None:
        """See `VisitorCarrier.close`. The carrier goes on."""
        self._end(reason)
        self._session.reset(reason)

    # Called by the carrier's owner

    def serve_one(self) -> None:
        """A channel is free: it is for the visitor that has waited longest."""
        if not self.over and self.side.serve_next():
            self._owner.starved[self] = None  # more of them wait: the other tunnels have their turn first

    def on_visitor_over(self, sid: int) -> None:
        """A visitor left."""
        del self.channels[sid]
        if not self.channels and not self.over:
            if self.retired:
                self._finish()
            else:
                self.side.on_idle()

    # As the handler of its session

    def on_data(self, data: memoryview) -> int:
        """The session carries no data."""
        self.close("a session that stands for a tunnel carries no data")
        return len(data)

    def on_writable(self) -> None:
        """Nothing: nothing is sent on it."""

    def on_eof(self) -> None:
        """The agent wants no more visitors of this tunnel."""
        self.retired = True
        self.side.retire(self)
        if not self.channels:
            self._finish()

    def on_write_failed(self, _error: OSError) -> None:
        """Nothing: nothing is sent on it."""

    def on_reset(self, error: OSError) -> None:
        """The agent gave the tunnel up, with its visitors; or the carrier is lost."""
        self._end(str(error))

    def on_internal_error(self, error: Exception) -> None:
        """A callback above raised: a bug, which ends this tunnel on this carrier and no other one."""
        log.error("tunnel on a shared carrier failed: a bug", exc_info=error)
        self._end("internal error")

    # Internal

    def _finish(self) -> None:
        """The agent wants no more visitors, and the last one has left."""
        self._end("")
        self._session.finish()

    def _end(self, reason: str) -> None:
        """Cut the visitors on this carrier, and leave the server side."""
        if self.over:
            return
        self.over = True
        self._owner.forget(self, self._protocol)
        for channel in list(self.channels.values()):
            self.carrier.reset(channel, reason)
            channel.notify_reset(reason)
        self.side.on_carrier_closed(self)


class SharedCarrier:
    """The tunnels of one carrier. Implements `CarrierEvents`, and `HasServerConnections` for their owner."""

    connections = 1
    """The connection counts once, however many tunnels it has."""

    def __init__(self, carrier: Carrier, registry: KeyRegistry, peer: Peer, max_carriers: int) -> None:
        """`max_carriers` is the limit of each tunnel."""
        self.carrier = carrier
        self.tunnels: dict[int, CarriedTunnel] = {}  # by protocol id
        self.tunnel_of: dict[int, CarriedTunnel] = {}  # by the session id of a visitor
        self.starved: dict[CarriedTunnel, None] = {}  # whose visitors wait for a free channel; an ordered set
        self._registry = registry
        self._peer = peer
        self._max_carriers = max_carriers
        self._tenant: Tenant | None = None  # the owner of all its tunnels, once there is one

    # Called by the carrier

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The agent opened a session: one for a tunnel is accepted, or refused with the reason."""
        try:
            self.admit(channel, protocol)
        except TunneldError as error:
            channel.reset(f"{error.code} {error}")
            log.info("tunnel refused on a shared carrier", peer=format_peer(self._peer), reason=str(error))

    def admit(self, session: Channel, protocol: int) -> None:
        """Take the tunnel that a session is for. Raises `NoSuchTunnelError`, `NotAllowedError` or `LimitReachedError`;
        the caller resets the session then.
        """
        if protocol < FIRST_ATOM or protocol in self.tunnels:
            raise NotAllowedError(NO_SESSIONS)
        side = find_side(self._registry, self.carrier.mux.peer_atom(protocol))
        if self._tenant is None:
            self._check_place(side.tenant)
        elif side.tenant is not self._tenant:
            raise NotAllowedError("the other tunnels of this connection belong to another credential")
        tunnel = CarriedTunnel(self, side, session, protocol)
        side.check_admissible(self._peer, self._max_carriers, is_counted=True)
        if self._tenant is None:
            self._adopt(side)
        session.handler = tunnel
        session.accept()  # before its first visitor
        self.tunnels[protocol] = tunnel
        side.add(tunnel, self._peer, is_counted=True)

    def on_over(self, channel: Channel) -> None:
        """A session ended: one of a visitor leaves its place to the next."""
        sid = channel.sid
        tunnel = self.tunnel_of.pop(sid, None)
        if tunnel is not None:
            tunnel.on_visitor_over(sid)
        if self.starved:
            self.on_capacity()

    def on_capacity(self) -> None:
        """A channel may be free: the tunnels whose visitors wait for one have it in turn."""
        starved = self.starved
        while starved and self.carrier.can_open:
            tunnel = next(iter(starved))
            del starved[tunnel]
            tunnel.serve_one()

    def forget(self, tunnel: CarriedTunnel, protocol: int) -> None:
        """A tunnel has left the carrier."""
        del self.tunnels[protocol]
        self.starved.pop(tunnel, None)

    def on_endpoint(self, uri: str | None) -> None:
        """Ignored: that is for a carrier of one tunnel."""

    def on_pong(self) -> None:
        """Nothing: the heartbeat has noted it."""

    def on_unresponsive(self) -> None:
        """The agent did not reply to a ping; server sides prefer other carriers from now on."""
        log.info("carrier does not answer", peer=format_peer(self._peer))

    def on_closed(self, reason: str) -> None:
        """The carrier was closed or lost; each session has been told."""
        if self._tenant is not None:
            self._tenant.server_sides.discard(self)
        log.info("carrier closed", peer=format_peer(self._peer), reason=reason)

    # Internal

    def _check_place(self, tenant: Tenant) -> None:
        """Raise `LimitReachedError` where the owner may have no further connection."""
        if tenant.server_connections_left <= 0:
            count = tenant.limits.server_connections
            raise LimitReachedError(
                f"connection limit reached: its owner has {count} server connections (control.credential_share)"
            )

    def _adopt(self, side: MuxServerSide) -> None:
        """The first tunnel is there: the connection belongs to its owner."""
        carrier = self.carrier
        self._tenant = side.tenant
        self._tenant.server_sides.add(self)
        carrier.turns.share = side.share(carrier.pump.budget)
        carrier.owner = self
        carrier.mark_authenticated()
