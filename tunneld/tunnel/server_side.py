"""The contract between a tunnel and its server side.

            Tunnel                        ServerSide
              │   open, close                │  binds, owns the listener and the parked connections
              │   dial_nowait, dial  ──────► │  a connection to the hidden server, ready to relay
on_attached,  │ ◄──────────────────────────  │  a hidden server connected, or disconnected before
on_detached   │                              │  a visitor arrived
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from tunneld.auth.authority import Authority
from tunneld.config.schema import TunnelSettings
from tunneld.engine.end import End
from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import UsageError
from tunneld.net.address import Address
from tunneld.net.endpoint import Endpoint, Peer
from tunneld.net.sockets import PortOrder
from tunneld.policy.options import TunnelOptions
from tunneld.sites.names import SharedNames
from tunneld.tls.identity import Identity
from tunneld.tunnel.private_tunnels import PrivateTunnels
from tunneld.tunnel.tenants import Tenant

if TYPE_CHECKING:
    from tunneld.tunnel.keys import KeyRegistry


class Handshakes(Protocol):
    """Runs the handshakes of connections that have not shown yet that they come from a hidden server."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For a handshake that begins now; None where this relay has no certificate."""

    def start(
        self, connection: socket.socket, peer: Peer, listener: str, handshake: Callable[[], Awaitable[None]], /
    ) -> None:
        """Run `handshake` for a new connection in a task of bounded time, or close the connection where there are too
        many unauthenticated ones. `listener` names the port in the log.

        `handshake` takes over the connection, or closes it and raises `OSError` or a `TunneldError` with the reason.
        """


@dataclass(frozen=True, slots=True)
class BackendServices:
    """What a relay provides to all of its server sides."""

    backends: Mapping[str, Backend] = field(default_factory=dict)  # by the names that openTunnel accepts
    keys: KeyRegistry | None = None  # None: this relay has no shared ports
    handshakes: Handshakes | None = None  # None: a hidden server cannot present a key on a port of its own
    names: SharedNames | None = None  # None: this relay has no host names
    privates: PrivateTunnels = field(default_factory=PrivateTunnels)
    identity: Callable[[], Identity | None] = lambda: None  # the relay's key, where it has one
    authority: Authority = field(default_factory=Authority)  # asks the operator's authorization service

    def backend(self, name: str) -> Backend:
        """The backend with this name. Raises `UsageError` where this relay has none."""
        backend = self.backends.get(name)
        if backend is None:
            raise UsageError(f"unrecognized backend {name!r}: this relay has {', '.join(self.backends)}")
        return backend


NO_SERVICES = BackendServices()


@dataclass(frozen=True, slots=True)
class ServerSideSnapshot:
    """What a server side hands over to the next process, which continues from it."""

    port: int = 0  # of its own listener
    listener: socket.socket | None = None  # None: it had none, or had closed it
    parked: Sequence[tuple[socket.socket, Peer]] = ()  # in the order of their arrival
    key: str = ""  # in its server URI
    scheme: str = ""  # of its server URI, if the relay's configuration can change it


@dataclass(frozen=True, slots=True)
class Takeover:
    """What a new tunnel may share with the one that it replaces, until that one closes."""

    listeners: Sequence[socket.socket] = ()  # the new tunnel duplicates the ones whose port it gets
    key: str = ""  # in the server URI
    addresses: Sequence[Address] = ()  # public ones


NO_TAKEOVER = Takeover()


@dataclass(frozen=True, slots=True)
class TunnelContext:
    """What a server side gets from its tunnel: where to listen, which peers to accept, what to call."""

    engine: Engine
    settings: TunnelSettings
    advertised_host: str
    client_port: int  # the public port, or that of a public URI where visitors reach the tunnel by names alone
    services: BackendServices
    secure: str  # as in `TunnelOptions`
    persist: bool  # the tunnel serves many visitors, one after another
    former: Endpoint | None  # the server URI of the tunnel that this one replaces: to be used again where possible
    ports: PortOrder  # that it may get, beside the port of `former`
    why_not_allowed: Callable[[Peer], str]  # why this peer may not connect as the hidden server; empty: it may
    parking_capacity: Callable[[], int]  # how many server connections may be parked now
    on_attached: Callable[[Peer], None]  # with the peer's address
    on_detached: Callable[[Peer], None]  # the same
    on_refused: Callable[[Peer, str], None]  # with the peer's address and the reason
    on_failure: FailureCallback  # with a bug in a callback
    tenant: Tenant = field(default_factory=Tenant)
    shared: bool = False  # several agents may serve the tunnel
    private: bool = False  # what visitors and hidden server exchange is encrypted end to end
    node: str = ""  # the id of the node that may serve it, as in `TunnelOptions`
    holder: str = ""  # owner and name, the same when it is opened again; empty for a tunnel without a name
    snapshot: ServerSideSnapshot | None = None  # of the server side in another process that this one continues
    takeover: Takeover = NO_TAKEOVER  # from the tunnel that this one replaces, which still serves


class ServerConnection(Protocol):
    """A connection to the hidden server for one visitor: a socket of its own, or a channel of a carrier."""

    def set_originator(self, visitor: Peer | None) -> None:
        """Set the address of the visitor, once and before anything else; None hides it. The
        backend passes it on to the hidden server if its protocol can.
        """

    def send(self, data: bytes) -> None:
        """Send a few bytes of the relay's own (a PROXY header) ahead of the visitor's. Raises `OSError` where the
        connection has failed.
        """

    @property
    def end(self) -> socket.socket | End:
        """What the engine joins to the visitor, and owns from then on."""

    def close(self) -> None:
        """Close an unused connection, which was not joined."""


class ServerSide(Protocol):
    """A way to dial the hidden server. Its constructor binds all that it needs, so that whatever can fail fails there,
    and takes nothing away from the server side of the tunnel that it replaces.
    """

    def start(self, nursery: trio.Nursery) -> None:
        """The tunnel runs: accept connections of the hidden server from now on. `nursery` owns the tasks of this server
        side. Called once, before `dial`.
        """

    def admit_agent(self, options: TunnelOptions) -> None:
        """Another agent shares the tunnel, with these options: permit its connections, too."""

    @property
    def takeover(self) -> Takeover:
        """What a tunnel that replaces this one may share with it."""

    @property
    def uri(self) -> Endpoint:
        """The server URI, to which the hidden server connects."""

    @property
    def parked(self) -> int:
        """How many visitors could be served at this moment."""

    @property
    def connections(self) -> int:
        """Connections of hidden servers that are parked, or that carry visitors together."""

    @property
    def live_connections(self) -> int:
        """How many connections of hidden servers carry one visitor after another and have not announced their end."""

    @property
    def unresponsive(self) -> bool:
        """Whether all connected hidden servers, as far as can be known, do not answer or accept no new visitors."""

    def dial_nowait(self) -> ServerConnection:
        """Return a connection to the hidden server, which the caller owns. Raises `trio.WouldBlock` where none is
        parked.
        """

    async def dial(self) -> ServerConnection:
        """Wait for a connection to the hidden server, first come first served. Cancelling loses no connection.

        Raises `trio.ClosedResourceError` once the server side is closed.
        """

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """Close parked connections until `keep` are left, without the ones from addresses in `spared`, which all stay.
        Returns how many were closed. A connection that a visitor has got is never closed.
        """

    def pause(self) -> None:
        """Accept no connection for now; new ones stay in the listener's queue. Precedes `export`."""

    def export(self) -> ServerSideSnapshot:
        """Hand over what another process can continue, without closing it, and end the rest in order. The caller owns
        the sockets, and calls `close` afterwards as usual. No call of `dial` may be waiting.
        """

    def close(self) -> None:
        """Stop listening and close all parked connections. Dialled connections belong to their callers."""


class Backend(Protocol):
    """A kind of server side: its class."""

    def __call__(self, context: TunnelContext, /) -> ServerSide:
        """Make a server side, bound and not started. Raises `ListenError`, `LimitReachedError`, `ShortageError` or
        `UsageError`.
        """

    def check(self, services: BackendServices, options: TunnelOptions, /) -> None:
        """Raise `UsageError` where this relay cannot have a server side with these options."""

    def is_encrypted(self, services: BackendServices, options: TunnelOptions, /) -> bool:
        """Whether the key in its server URI crosses the network in TLS. Then the hidden server may connect from any
        address.
        """
