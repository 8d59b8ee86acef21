"""What one process hands over to the next, for each tunnel: see daemon/handover. Plain values and sockets."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from tunneld.engine.handover import RelayState
from tunneld.net.address import Address, HostName
from tunneld.net.endpoint import Peer
from tunneld.tunnel.server_side import ServerSideSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

if TYPE_CHECKING:
    from tunneld.tunnel.tunnel import Tunnel


@dataclass(frozen=True, slots=True)
class TunnelCounters:
    """The counters and the age of a tunnel. Seconds are before the moment of its export."""

    age: float = 0.0
    idle: float = 0.0  # since the last connection of either side ended
    idle_checks: int = 0  # see `timeouts.TimedTunnel`
    served: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # by the values of `RefusalKind`
    up: int = 0  # bytes of connections that have ended
    down: int = 0
    quota_left: int | None = None  # bytes


@dataclass(frozen=True, slots=True)
class WaitingVisitor:
    """A visitor without a server connection, and the seconds that it may still wait for one."""

    visitor: Visitor
    seconds_left: float


@dataclass(frozen=True, slots=True)
class RelaySnapshot:
    """A relayed visitor between two processes, as in `RelayedVisitor`."""

    state: RelayState
    peer: Peer
    age: float  # seconds since it was joined to a server connection
    reached: Peer | None = None
    host: HostName | None = None
    credential: str | None = None


@dataclass(frozen=True, slots=True)
class IngressSnapshot:
    """What an ingress hands over to the next process."""

    address: Address
    listener: socket.socket | None  # None: it has none, or has closed it, because the tunnel is draining


@dataclass(frozen=True, slots=True)
class TunnelSnapshot:
    """A tunnel between two processes. Its holder owns all sockets in it."""

    spec: TunnelSpec
    draining: bool
    counters: TunnelCounters
    ingresses: Sequence[IngressSnapshot]
    waiting: Sequence[WaitingVisitor]
    server: ServerSideSnapshot
    relays: Sequence[RelaySnapshot]
    cut: int = 0  # connections that could not be handed over

    def close(self) -> None:
        """Close all sockets, where no process continues the tunnel."""
        listeners = [*(ingress.listener for ingress in self.ingresses), self.server.listener]
        parked = [connection for connection, _peer in self.server.parked]
        for one in [*listeners, *parked, *(waiting.visitor.end for waiting in self.waiting)]:
            if one is not None:
                one.close()
        for relay in self.relays:
            relay.state.close()


def snapshot_of(tunnel: Tunnel, *, draining: bool) -> TunnelSnapshot:
    """Take out of a tunnel what another process can continue, and end the rest. The caller owns the sockets."""
    now = trio.current_time()
    relays, cut = tunnel.visitors.export()
    up, down = tunnel.octets
    counters = TunnelCounters(
        age=now - tunnel.opened_at,
        idle=now - tunnel.idle_since,
        idle_checks=tunnel.idle_checks,
        served=tunnel.served,
        refused={kind.value: count for kind, count in tunnel.refusals.items()},
        up=up,
        down=down,
        quota_left=tunnel.visitors.quota_left,
    )
    return TunnelSnapshot(
        spec=tunnel.spec,
        draining=draining,
        counters=counters,
        ingresses=[ingress.export() for ingress in tunnel.ingresses],
        waiting=tunnel.arrivals.export(),
        server=tunnel.server_side.export(),
        relays=relays,
        cut=cut,
    )


QuarantinedPort = tuple[int, tuple[str, str], float]
"""A freed port, its last owner, and the seconds since it was freed; see policy/ports."""


TimedBan = tuple[str, float]
"""A banned network, and the seconds that are left; see policy/bans."""


@dataclass(frozen=True, slots=True)
class ServiceCounters:
    """The counters of the service for tunnels that have closed."""

    last_id: int = 0
    opened: int = 0
    octets: tuple[int, int] = (0, 0)  # up, down
    served: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)  # by the values of `RefusalKind`


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """All tunnels between two processes, each with the name of its credential."""

    counters: ServiceCounters = ServiceCounters()
    tunnels: Sequence[tuple[str, TunnelSnapshot]] = ()
    quarantined: Sequence[QuarantinedPort] = ()  # oldest first
    bans: Sequence[TimedBan] = ()
