"""What a tunnel leaves to its successor in the next process: see handover/."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunneld.engine.handover import RelayState
from tunneld.tunnel.server_side import ServerSideSnapshot
from tunneld.tunnel.spec import TunnelSpec


@dataclass(frozen=True, slots=True)
class TunnelCounters:
    """What a tunnel has counted and how old it is: seconds are before the moment at which it was left."""

    age: float = 0.0
    idle: float = 0.0  # since the last connection of either side went
    quiet: int = 0  # see clocks.py
    served: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # by the names of `Refused`
    up: int = 0  # octets of relays that have ended
    down: int = 0
    quota_left: int | None = None


@dataclass(frozen=True, slots=True)
class WaitingVisitor:
    """A visitor without a server connection, and how many seconds it has left to get one."""

    visitor: socket.socket
    peer: Any
    reached: Any  # the address that it connected to, where a proxy took the connection for us
    patience: float


@dataclass(frozen=True, slots=True)
class ClientSideSnapshot:
    """What a client side leaves to its successor in the next process."""

    port: int
    listener: socket.socket | None  # None: it had been closed, for the tunnel is drained
    waiting: Sequence[WaitingVisitor] = ()


@dataclass(frozen=True, slots=True)
class TunnelSnapshot:
    """A tunnel between two processes. Whoever has it owns all sockets in it."""

    spec: TunnelSpec
    draining: bool
    counters: TunnelCounters
    client: ClientSideSnapshot
    server: ServerSideSnapshot
    relays: Sequence[tuple[RelayState, Any]]  # each with its visitor's address
    cut: int = 0  # relays that could not go along

    def close(self) -> None:
        """Nobody goes on with it."""
        listeners = [one for one in (self.client.listener, self.server.listener) if one is not None]
        parked = [connection for connection, _peer in self.server.parked]
        for one in [*listeners, *parked, *(waiting.visitor for waiting in self.client.waiting)]:
            one.close()
        for lifted, _peer in self.relays:
            lifted.close()


@dataclass(frozen=True, slots=True)
class ServiceCounters:
    """What the service has counted of tunnels that are no more."""

    last_id: int = 0
    opened: int = 0
    octets: tuple[int, int] = (0, 0)  # up, down
    served: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)  # by the names of `Refused`


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """All tunnels between two processes, each with the name of its credential."""

    counters: ServiceCounters = ServiceCounters()
    tunnels: Sequence[tuple[str, TunnelSnapshot]] = ()
