"""The reference backend: plain TCP, one connection from the hidden server for each visitor.

The hidden server connects ahead of its visitors and its connection is *parked*: not read from, so what it says
before a visitor comes stays in the kernel, in order, bounded by the socket's buffer. Parked connections are watched,
though: one whose peer leaves without having said anything is gone at once. One that spoke and then ended is kept,
since a visitor can still be told what it said.

With `secure=` it shows a key first, in TLS where that was asked for, and is parked then: see keyed.py.
"""

from __future__ import annotations

import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable, Container
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import trio

from tunneld.backends.queue import WaitQueue
from tunneld.config.schema import TunnelSettings
from tunneld.engine.acceptor import peer_closed
from tunneld.engine.engine import Engine, FailureCallback, Limiter, Registration, Relay, RelayEnd
from tunneld.errors import LimitReachedError, NoSuchTunnelError, UsageError
from tunneld.net.endpoint import Endpoint, unmap
from tunneld.net.sockets import bind_in_range, taken_out
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.server_side import BackendServices, ServerConnection, ServerSideSnapshot, TunnelContext
from tunneld.wire.lines import format_err

KEY_OCTETS = 16
"""Of randomness, 32 hexadecimal digits: nobody guesses one, a person can copy it, and none of them is among the letters
that `openssl s_client` takes for a command.
"""


class Parkable(ServerConnection, Protocol):
    """A connection of the hidden server that can wait for a visitor."""

    @property
    def peer(self) -> Any:
        """The hidden server's address."""

    def watch(self, left: Callable[[], None], failed: FailureCallback, /) -> Registration:
        """Call `left` when the hidden server leaves without having said anything; perhaps more than once."""


class TcpServerSide:
    """A listener for the hidden server, and its connections that wait for visitors."""

    def __init__(self, host: TunnelContext) -> None:
        settings = host.settings
        self._host = host
        legacy = host.snapshot
        self._key = _key(host)
        self._listener = _bind(settings, host.former, host.reserved) if legacy is None else legacy.listener
        port = self._listener.getsockname()[1] if self._listener is not None else legacy.port if legacy else 0
        self._uri = Endpoint("tls" if host.secure == "yes" else "tcp", host.advertised_host, port, self._key)
        self._parked = OrderedDict[Parkable, Registration]()  # in the order in which they came
        self._line = WaitQueue[Parkable]()
        self._newcomers: set[trio.CancelScope] = set()
        self._closed = False
        self._accepting = (
            host.engine.listen(self._listener, self._arrived, host.on_failure) if self._listener is not None else None
        )
        for connection, peer in legacy.parked if legacy is not None else ():
            self._offer(TcpServerConnection(host.engine, connection, peer))

    @staticmethod
    def check(premises: BackendServices, options: TunnelOptions) -> None:
        """See `Backend`: every relay has it, but not every one has a lobby and a certificate."""
        if options.secure == "no":
            return
        if premises.handshakes is None:
            raise UsageError(f"option secure={options.secure}: this relay's system has no epoll, which it needs")
        if options.secure == "yes" and premises.handshakes.tls is None:
            raise UsageError(
                "option secure=yes: this relay has no certificate ([control.tls]); secure=key asks for a key alone"
            )

    @staticmethod
    def hides_key(_premises: BackendServices, options: TunnelOptions) -> bool:
        """See `Backend`."""
        return options.secure == "yes"

    @property
    def uri(self) -> Endpoint:
        """`tcp://HOST:PORT`, or with a key behind it `tls://HOST:PORT/KEY` or `tcp://HOST:PORT/KEY`."""
        return self._uri

    @property
    def parked(self) -> int:
        """How many connections of the hidden server wait for a visitor."""
        return len(self._parked)

    @property
    def live_connections(self) -> int:
        """None: each of them serves one visitor."""
        return 0

    @property
    def unresponsive(self) -> bool:
        """Never: a parked connection cannot be asked."""
        return False

    def dial_nowait(self) -> Parkable:
        """The connection parked longest. Raises `trio.WouldBlock`."""
        if not self._parked or self._line.waiters:
            raise trio.WouldBlock
        return self._take()

    async def dial(self) -> Parkable:
        """Wait in line for the next connection of the hidden server. Raises `trio.ClosedResourceError` once closed."""
        if self._parked and not self._line.waiters:  # one came since dial_nowait, and nobody stands in line before us
            return self._take()
        return await self._line.wait()

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """See `ServerSide`: those parked longest go first."""
        parked = [connection for connection in self._parked if unmap(str(connection.peer[0])) not in spared]
        surplus = parked[: max(0, len(parked) - keep)]
        for connection in surplus:
            self._parked.pop(connection).release()
            connection.close()
        return len(surplus)

    def pause(self) -> None:
        """See `ServerSide`."""
        if self._accepting is not None:
            self._accepting.release()

    def export(self) -> ServerSideSnapshot:
        """See `ServerSide`."""
        self.pause()
        parked = []
        while self._parked:
            connection = self._take()
            if isinstance(connection, TcpServerConnection):
                parked.append((taken_out(connection.socket), connection.peer))
            else:
                connection.close()  # what is in TLS is in this process; the hidden server dials again
        listening = self._listener is not None and self._listener.fileno() != -1
        listener = taken_out(self._listener) if self._listener is not None and listening else None
        return ServerSideSnapshot(self._uri.port, listener, parked, self._key)

    def close(self) -> None:
        """Stop listening, close what is parked, send those in line away. Harmless when repeated."""
        self._closed = True
        self.pause()
        if self._listener is not None:
            self._listener.close()
        for scope in self._newcomers:
            scope.cancel()
        self.trim(0)
        self._line.close()

    def _arrived(self, connection: socket.socket, peer: Any) -> None:
        """Admit one connection that claims to be the hidden server."""
        lobby = self._host.services.handshakes
        if reason := self._refusal(peer):
            connection.close()
            self._host.on_refused(peer, reason)
        elif self._key and lobby is not None:
            lobby.start(connection, peer, "tcp", partial(self._hear_out, connection, peer))
        else:
            self._admit(TcpServerConnection(self._host.engine, connection, peer))

    def _refusal(self, peer: Any) -> str:
        """Why it is not taken, if so."""
        if reason := self._host.why_not_allowed(peer):
            return reason
        if len(self._parked) >= self._host.parking_capacity():
            return f"{len(self._parked)} server connections are parked already"
        return ""

    async def _hear_out(self, connection: socket.socket, peer: Any) -> None:
        """Somebody who must show the key; see `Handshakes.start`."""
        from tunneld.backends import keyed  # noqa: PLC0415  # only where there is a pump, as its lobby

        assert self._host.services.handshakes is not None
        with trio.CancelScope() as scope:
            self._newcomers.add(scope)
            try:
                encrypted = self._host.secure == "yes"
                way, ahead = await keyed.read_key(
                    connection, self._key, self._host.services.handshakes, encrypted=encrypted
                )
            finally:
                self._newcomers.discard(scope)
            try:
                self._check_open()
                if reason := self._refusal(peer):
                    await keyed.say(way, format_err(LimitReachedError.code, reason))
                    raise LimitReachedError(reason)
                await keyed.say(way, keyed.OK)
                self._check_open()
                if isinstance(way, socket.socket):
                    self._admit(TcpServerConnection(self._host.engine, way, peer))
                else:
                    self._admit(keyed.serve(way, ahead, self._host, peer))
            except BaseException:
                keyed.close(way)
                raise

    def _check_open(self) -> None:
        """Nobody is parked any more once it is closed, also who showed the key in that moment."""
        if self._closed:
            raise NoSuchTunnelError("the tunnel closed")

    def _admit(self, connection: Parkable) -> None:
        self._offer(connection)
        self._host.on_attached(connection.peer)

    def _offer(self, connection: Parkable) -> None:
        """Give a connection to whoever waits longest, or park it."""
        if self._line.waiters:
            self._line.serve(connection)
        else:
            self._parked[connection] = connection.watch(lambda: self._left(connection), self._host.on_failure)

    def _take(self) -> Parkable:
        """Unpark the connection parked longest."""
        connection, watching = self._parked.popitem(last=False)
        watching.release()
        return connection

    def _left(self, connection: Parkable) -> None:
        """The hidden server has left, and has said nothing to a visitor to come."""
        if connection in self._parked:
            self._parked.pop(connection).release()
            connection.close()
            self._host.on_detached(connection.peer)


def _key(host: TunnelContext) -> str:
    """The key to show: none, the one of the tunnel whose place this one takes, or a new one."""
    if host.secure == "no":
        return ""
    if host.snapshot is not None:
        return host.snapshot.key
    former = host.former
    return (
        former.key
        if former is not None and former.key and former.scheme in {"tcp", "tls"}
        else secrets.token_hex(KEY_OCTETS)
    )


def _bind(settings: TunnelSettings, former: Endpoint | None, reserved: Container[int]) -> socket.socket:
    """A listener, on the former port where that is free. Raises as `bind_in_range`."""
    if former is not None and (former.port in settings.port_range or settings.port_range[0] == 0):
        with suppress(LimitReachedError):
            return bind_in_range(settings.host, range(former.port, former.port + 1), keepalive=settings.keepalive)
    return bind_in_range(settings.host, settings.port_range, keepalive=settings.keepalive, reserved=reserved)


class TcpServerConnection:
    """A connection that the hidden server made, for one visitor. See `ServerConnection`."""

    __slots__ = ("_engine", "peer", "socket")

    def __init__(self, engine: Engine, connection: socket.socket, peer: Any) -> None:
        self._engine = engine
        self.socket = connection
        self.peer = peer

    def watch(self, left: Callable[[], None], failed: FailureCallback) -> Registration:
        """See `Parkable`."""

        def look() -> None:
            if peer_closed(self.socket):
                left()

        return self._engine.watch(self.socket, look, failed)

    def set_originator(self, visitor: Any | None) -> None:
        """TCP has no word for it."""

    def send(self, data: bytes) -> None:
        """A header fits the empty buffer of a connection on which nothing was said."""
        self.socket.send(data)

    def join(
        self,
        visitor: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """Hand both sockets to the engine."""
        return self._engine.join(visitor, self.socket, linger=linger, on_end=on_end, throttle=throttle)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
