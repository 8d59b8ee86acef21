"""The reference backend: plain TCP, one connection of the hidden server per visitor.

The hidden server connects before its visitors do, and each connection is *parked* until a visitor needs it; parked.py
says which one that gets. A parked
connection is not read: bytes that arrive early stay in the kernel, in order, limited by the socket's receive buffer. It
is watched, though. If the peer closes a connection on which it has sent nothing, the connection is dropped at once. If
it sent something first, a one-shot tunnel keeps the connection, because its visitor can still receive the bytes. A
persistent tunnel drops it: a server that greets and gives up on a silent client (sshd, MySQL) has nothing to say to the
next visitor, and another connection follows.

With the option `secure`, a hidden server sends a key first, inside TLS if requested, and is parked after that: see
keyed.py.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Container
from contextlib import suppress
from functools import partial

import trio

from tunneld.backends.parked import ParkableConnection, ParkedConnections
from tunneld.backends.queue import WaitQueue
from tunneld.engine.acceptor import peer_closed, peer_ended
from tunneld.engine.engine import Engine, FailureCallback, Registration
from tunneld.errors import LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.net import liveness
from tunneld.net.endpoint import Endpoint, Peer
from tunneld.net.sockets import bind_in_range, bind_port, taken_out
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.server_side import BackendServices, ServerSideSnapshot, Takeover, TunnelContext
from tunneld.wire.lines import format_err

SERVER_KEY_BYTES = 16
"""Random bytes of a key, which is written as 32 hexadecimal digits. It cannot be guessed, a person can copy it, and it
contains none of the letters that `openssl s_client` takes for a command.
"""


ONE_SHOT_ENDED = frozenset({liveness.TCP_CLOSE})
PERSISTENT_ENDED = frozenset({liveness.TCP_CLOSE, liveness.TCP_CLOSE_WAIT})
"""States in which a connection of a one-shot or of a persistent tunnel is of no use to a visitor any more."""


class TcpServerSide:
    """The listener for the hidden server of one tunnel, and its parked connections. Implements `ServerSide`."""

    def __init__(self, context: TunnelContext) -> None:
        """Listen, or adopt the listener and the parked connections of `context.snapshot`. Raises as `bind_in_range`."""
        snapshot = context.snapshot
        self._context = context
        scheme = "tls" if context.secure == "yes" else "tcp"
        self._key = _choose_key(context, scheme)
        self._listener = _bind(context) if snapshot is None else snapshot.listener
        port = self._listener.getsockname()[1] if self._listener is not None else snapshot.port if snapshot else 0
        self._uri = Endpoint(scheme, context.advertised_host, port, self._key)
        self._parked = ParkedConnections(
            context.settings.parked_check,
            self._on_parked_closed,
            self._serve_waiting,
            context.on_failure,
            shared=context.shared,
        )
        self._queue = WaitQueue[ParkableConnection]()
        self._handshakes: set[trio.CancelScope] = set()
        self._closed = False
        self._accepting: Registration | None = None
        for connection, peer in snapshot.parked if snapshot is not None else ():
            self._serve_or_park(self._plain(connection, peer))

    def start(self, nursery: trio.Nursery) -> None:
        """See `ServerSide.start`. One task, which checks silent connections."""
        nursery.start_soon(self._parked.check)
        if self._listener is not None:
            context = self._context
            self._accepting = context.engine.listen(self._listener, self._on_connection, context.on_failure)

    def admit_agent(self, _options: TunnelOptions) -> None:
        """See `ServerSide.admit_agent`: any agent from a permitted address is permitted."""

    @property
    def takeover(self) -> Takeover:
        """See `ServerSide.takeover`: its listener, while it is open. The key is in the reservation."""
        return Takeover([self._listener] if self._listener is not None and not self._closed else [])

    @staticmethod
    def check(services: BackendServices, options: TunnelOptions) -> None:
        """See `Backend.check`. Every relay has this backend, but `secure` needs the pump, and TLS a certificate."""
        if options.secure == "no":
            return
        if services.handshakes is None:
            raise UsageError(f"option secure={options.secure} requires epoll, which this relay's system does not have")
        if options.secure == "yes" and services.handshakes.tls is None:
            raise UsageError(
                "option secure=yes requires a certificate, and this relay has none ([control.tls]); "
                "use secure=key for a key without encryption"
            )

    @staticmethod
    def is_encrypted(_services: BackendServices, options: TunnelOptions) -> bool:
        """See `Backend.is_encrypted`."""
        return options.secure == "yes"

    @property
    def uri(self) -> Endpoint:
        """`tcp://HOST:PORT`; with a key `tls://HOST:PORT/KEY` or `tcp://HOST:PORT/KEY`."""
        return self._uri

    @property
    def parked(self) -> int:
        """The number of parked connections."""
        return len(self._parked)

    @property
    def connections(self) -> int:
        """See `ServerSide.connections`."""
        return len(self._parked)

    @property
    def parked_connections(self) -> ParkedConnections:
        """The parked connections themselves."""
        return self._parked

    @property
    def live_connections(self) -> int:
        """Always 0: a connection serves one visitor only."""
        return 0

    @property
    def unresponsive(self) -> bool:
        """Always False: a parked connection cannot be pinged."""
        return False

    def dial_nowait(self) -> ParkableConnection:
        """Unpark a connection, which the caller then owns. Raises `trio.WouldBlock` if none is ready."""
        if self._queue.waiters or (connection := self._unpark()) is None:
            raise trio.WouldBlock
        return connection

    async def dial(self) -> ParkableConnection:
        """Wait for a connection, which the caller then owns. Raises `trio.ClosedResourceError` once this is closed."""
        if not self._queue.waiters and (connection := self._unpark()) is not None:  # parked since dial_nowait
            return connection
        return await self._queue.wait()

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """See `ServerSide.trim`. Closes the connections that have been parked longest."""
        return self._parked.trim(keep, spared)

    def pause(self) -> None:
        """See `ServerSide.pause`."""
        if self._accepting is not None:
            self._accepting.release()

    def export(self) -> ServerSideSnapshot:
        """See `ServerSide.export`. Connections in TLS are closed: their TLS state is in this process, and the hidden
        server connects again.
        """
        self.pause()
        parked = []
        for connection in self._parked.take_all():
            if isinstance(connection, TcpServerConnection):
                parked.append((taken_out(connection.socket), connection.peer))
            else:
                connection.close()
        listening = self._listener is not None and self._listener.fileno() != -1
        listener = taken_out(self._listener) if self._listener is not None and listening else None
        return ServerSideSnapshot(self._uri.port, listener, parked, self._key)

    def close(self) -> None:
        """Stop listening, close parked connections, cancel handshakes, and fail waiting `dial` calls. Idempotent."""
        self._closed = True
        self.pause()
        if self._listener is not None:
            self._listener.close()
        for scope in self._handshakes:
            scope.cancel()
        self.trim(0)
        self._queue.close()

    def _on_connection(self, connection: socket.socket, peer: Peer) -> None:
        """The engine accepted a connection: refuse it, start its handshake, or park it."""
        handshakes = self._context.services.handshakes
        if reason := self._refusal(peer):
            connection.close()
            self._context.on_refused(peer, reason)
        elif self._key and handshakes is not None:
            handshakes.start(connection, peer, "tcp", partial(self._handshake, connection, peer))
        else:
            self._admit(self._plain(connection, peer))

    def _refusal(self, peer: Peer) -> str:
        """Why a connection of this peer is refused; empty if it is not."""
        if reason := self._context.why_not_allowed(peer):
            return reason
        if len(self._parked) >= self._context.parking_capacity():
            return f"limit of idle connections reached: {len(self._parked)} wait for visitors already"
        return ""

    async def _handshake(self, connection: socket.socket, peer: Peer) -> None:
        """Read the key and park the connection. Runs in a task of the `Handshakes`, which see for what it raises."""
        from tunneld.backends import keyed  # noqa: PLC0415  # needs the pump, as `Handshakes` do

        assert self._context.services.handshakes is not None
        with trio.CancelScope() as scope:
            self._handshakes.add(scope)
            try:
                encrypted = self._context.secure == "yes"
                transport, early = await keyed.read_key(
                    connection, self._key, self._context.services.handshakes, encrypted=encrypted
                )
            finally:
                self._handshakes.discard(scope)
            try:
                self._check_open()
                if reason := self._refusal(peer):
                    await keyed.send_line(transport, format_err(LimitReachedError.code, reason))
                    raise LimitReachedError(reason)
                await keyed.send_line(transport, keyed.OK)
                self._check_open()
                if isinstance(transport, socket.socket):
                    self._admit(self._plain(transport, peer))
                else:
                    self._admit(keyed.serve(transport, early, self._context, peer))
            except BaseException:
                keyed.close(transport)
                raise

    def _plain(self, connection: socket.socket, peer: Peer) -> TcpServerConnection:
        return TcpServerConnection(self._context.engine, connection, peer, persist=self._context.persist)

    def _check_open(self) -> None:
        """Raise `NoSuchTunnelError` if this was closed during the handshake, so that no connection is parked after."""
        if self._closed:
            raise NoSuchTunnelError("the tunnel closed")

    def _admit(self, connection: ParkableConnection) -> None:
        self._serve_or_park(connection)
        self._context.on_attached(connection.peer)

    def _serve_or_park(self, connection: ParkableConnection) -> None:
        """Give the connection to the visitor that has waited longest, or park it."""
        if self._queue.waiters:
            self._queue.serve(connection)
        else:
            self._parked.add(connection)

    def _unpark(self) -> ParkableConnection | None:
        """Unpark the best connection that is ready, if any."""
        if (connection := self._parked.take()) is not None:
            connection.set_keepalive(self._context.settings.keepalive)
        return connection

    def _serve_waiting(self) -> None:
        """Give parked connections that turned out to work to the visitors that have waited longest."""
        while self._queue.waiters and (connection := self._unpark()) is not None:
            self._queue.serve(connection)

    def _on_parked_closed(self, connection: ParkableConnection) -> None:
        """A parked connection ended before a visitor came."""
        self._context.on_detached(connection.peer)


def _choose_key(context: TunnelContext, scheme: str) -> str:
    """The key of this server side: empty without `secure`, else the one that its hidden server knows already, or a new
    one. A key that was used with another scheme is not used again: it may have crossed the network in clear.
    """
    if context.secure == "no":
        return ""
    if context.snapshot is not None:
        return context.snapshot.key
    former = context.former
    return (
        former.key
        if former is not None and former.key and former.scheme == scheme
        else secrets.token_hex(SERVER_KEY_BYTES)
    )


def _bind(context: TunnelContext) -> socket.socket:
    """A listener, on the former port if that is free and still in range. Raises as `bind_in_range`."""
    settings, port = context.settings, context.former.port if context.former is not None else 0
    if port not in {0, context.client_port} and (port in settings.port_range or settings.port_range[0] == 0):
        with suppress(LimitReachedError):
            return bind_port(settings.host, port, keepalive=settings.parked_check, held=context.takeover.listeners)
    return bind_in_range(settings.host, settings.port_range, keepalive=settings.parked_check, order=context.ports)


class TcpServerConnection:
    """A plain TCP connection of the hidden server, for one visitor. Implements `ParkableConnection`."""

    __slots__ = ("_ended", "_engine", "_is_useless", "peer", "socket")

    def __init__(self, engine: Engine, connection: socket.socket, peer: Peer, *, persist: bool) -> None:
        """`persist`: it is of no use to a visitor once the peer has ended, even if bytes are left to read."""
        self._engine = engine
        self._is_useless = peer_ended if persist else peer_closed
        self._ended = PERSISTENT_ENDED if persist else ONE_SHOT_ENDED
        self.socket = connection
        self.peer = peer

    def heard_ago(self) -> float:
        """See `ParkableConnection.heard_ago`."""
        return liveness.heard_ago(self.socket, self._ended)

    def probe(self) -> None:
        """See `ParkableConnection.probe`."""
        liveness.probe(self.socket)

    def set_keepalive(self, seconds: float) -> None:
        """See `ParkableConnection.set_keepalive`."""
        liveness.set_keepalive(self.socket, seconds)

    def watch(self, on_closed: Callable[[], None], on_failure: FailureCallback) -> Registration:
        """See `ParkableConnection.watch`."""

        def on_readable() -> None:
            if self._is_useless(self.socket):
                on_closed()

        return self._engine.watch(self.socket, on_readable, on_failure)

    def set_originator(self, visitor: Peer | None) -> None:
        """Nothing: TCP cannot carry the visitor's address."""

    def send(self, data: bytes) -> None:
        """See `ServerConnection.send`. A PROXY header fits the empty send buffer of an unused connection."""
        self.socket.send(data)

    @property
    def end(self) -> socket.socket:
        """See `ServerConnection.end`."""
        return self.socket

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
