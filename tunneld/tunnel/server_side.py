"""The contract between a tunnel and its server side.

            Tunnel                        ServerSide
              │   open, close                │  binds, owns the listener and what is parked
              │   dial_nowait, dial  ──────► │  a connection to the hidden server, ready to relay
attached,     │ ◄──────────────────────────  │  the hidden server came, or went before a visitor did
detached      │
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tunneld.config.schema import TunnelSettings
from tunneld.engine.engine import Engine, FailureCallback, Limiter, Relay, RelayEnd
from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.policy.options import TunnelOptions

if TYPE_CHECKING:
    from tunneld.tunnel.keys import KeyRegistry


class Handshakes(Protocol):
    """Where those wait who have connected as a hidden server, until it is known whether they are one."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For a handshake that begins now; None where this relay has no certificate."""

    def start(
        self, connection: socket.socket, peer: Any, listener: str, handshake: Callable[[], Awaitable[None]], /
    ) -> None:
        """Run `handshake` for a new connection in a task of bounded time, or close the connection where there are too
        many unauthenticated ones. `listener` names the port in the log.

        `handshake` takes over the connection, or closes it and raises `OSError` or a `TunneldError` with the reason.
        """


@dataclass(frozen=True, slots=True)
class BackendServices:
    """What a relay offers to all of its server sides."""

    backends: Mapping[str, Backend] = field(default_factory=dict)  # by the names that openTunnel takes
    keys: KeyRegistry | None = None  # the shared ports of backends; None: this relay has none
    handshakes: Handshakes | None = None  # None: a hidden server cannot show a key here

    def backend(self, name: str) -> Backend:
        """The backend of this name. Raises `UsageError` where this relay has none."""
        backend = self.backends.get(name)
        if backend is None:
            raise UsageError(f"unrecognized backend {name!r}: this relay has {', '.join(self.backends)}")
        return backend


NO_SERVICES = BackendServices()

Peer = Any
"""The address of whoever is at the other end of a socket."""


@dataclass(frozen=True, slots=True)
class ServerSideSnapshot:
    """What a server side leaves to its successor in the next process, which takes it over instead of beginning anew."""

    port: int = 0  # of its own listener
    listener: socket.socket | None = None  # None: it had none, or had closed it
    parked: Sequence[tuple[socket.socket, Peer]] = ()  # in the order in which they came
    key: str = ""  # in its server URI


@dataclass(frozen=True, slots=True)
class TunnelContext:
    """What a server side gets from its tunnel: where to listen, whom to admit, whom to tell."""

    engine: Engine
    settings: TunnelSettings
    advertised_host: str
    client_port: int  # of the client side
    services: BackendServices
    secure: str  # as in `TunnelOptions`
    former: Endpoint | None  # the server URI that a hidden server may still know: to be had again if it can be
    reserved: Container[int]  # ports that are somebody's: none of them is for this one, but that of `former`
    why_not_allowed: Callable[[Any], str]  # why this peer's address may not pose as the hidden server; empty: it may
    parking_capacity: Callable[[], int]  # how many server connections may be parked now
    on_attached: Callable[[Any], None]  # with the peer's address
    on_detached: Callable[[Any], None]
    on_refused: Callable[[Any, str], None]  # with the peer's address and the reason
    on_failure: FailureCallback  # a bug in a callback
    snapshot: ServerSideSnapshot | None = None  # of the one whose place it takes in this process


class ServerConnection(Protocol):
    """A way to the hidden server for one visitor: a connection of its own, or a channel of a carrier."""

    def set_originator(self, visitor: Any | None) -> None:
        """It is for this visitor (an address; None: nobody is to know), said once and before anything else. A backend
        that has a word for it tells the hidden server.
        """

    def send(self, data: bytes) -> None:
        """Say a few octets of ours (a PROXY header) before anything of the visitor's. Raises OSError where it broke."""

    def join(
        self,
        visitor: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """Relay between the visitor and the hidden server; see `Engine.join`. Both belong to the relay from now on."""

    def close(self) -> None:
        """Let go of it, unused. Not after `join`."""


class ServerSide(Protocol):
    """A way to dial the hidden server."""

    @property
    def uri(self) -> Endpoint:
        """Where the hidden server connects to."""

    @property
    def parked(self) -> int:
        """How many visitors could be served at once, now."""

    @property
    def live_connections(self) -> int:
        """How many connections of hidden servers take visitors, one after another, and have not said that they end."""

    @property
    def unresponsive(self) -> bool:
        """Whether the hidden server is connected and does not answer, as far as can be known, or wants nobody new."""

    def dial_nowait(self) -> ServerConnection:
        """A connection to the hidden server, owned by the caller from now on. Raises `trio.WouldBlock` where none is
        at hand.
        """

    async def dial(self) -> ServerConnection:
        """Wait for a connection to the hidden server, first come first served. Cancelling loses no connection.

        Raises `trio.ClosedResourceError` once the server side is closed.
        """

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """Close parked connections until `keep` are left, not counting those from addresses that are `spared`; returns
        how many were closed. None that a visitor got is among them.
        """

    def pause(self) -> None:
        """Accept no connection for now; whoever comes stands in the listener's queue. For `leave`."""

    def export(self) -> ServerSideSnapshot:
        """Let go of everything that a successor can go on with, closing nothing of it, and end the rest in order.
        Nobody waits in `dial` any more. Then `close`, as ever.
        """

    def close(self) -> None:
        """Stop listening and close everything parked; connections already dialled are the caller's."""


class Backend(Protocol):
    """A kind of server side: its class."""

    def __call__(self, host: TunnelContext, /) -> ServerSide:
        """One that listens already. Raises `ListenError`, `LimitReachedError`, `ShortageError` or `UsageError`."""

    def check(self, premises: BackendServices, options: TunnelOptions, /) -> None:
        """Raise `UsageError` where this relay cannot have one such as these options ask for."""

    def hides_key(self, premises: BackendServices, options: TunnelOptions, /) -> bool:
        """Whether its server URI has a key that crosses in TLS: then the hidden server may come from anywhere."""
