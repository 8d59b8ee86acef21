"""The reference backend: plain TCP, one connection from the hidden server for each visitor.

The hidden server connects ahead of its visitors and its connection is *parked*: not read from, so what it says
before a visitor comes stays in the kernel, in order, bounded by the socket's buffer. Parked connections are watched,
though: one whose peer leaves without having said anything is gone at once. One that spoke and then ended is kept,
since a visitor can still be told what it said.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any

import trio

from tunneld.backends.base import Host
from tunneld.config.schema import Tunnels
from tunneld.endpoint import Endpoint, contains
from tunneld.errors import LimitReachedError
from tunneld.net import bind_in_range
from tunneld.relay.engine import Engine, Limiter, Registration, Relay, RelayEnd
from tunneld.relay.look import has_left


class Tcp:
    """A listener for the hidden server, and its connections that wait for visitors."""

    def __init__(self, host: Host) -> None:
        settings = host.settings
        self._host = host
        self._listener = _bind(settings, host.former, host.reserved)
        self._uri = Endpoint("tcp", host.advertised_host, self._listener.getsockname()[1])
        self._parked: dict[TcpConnection, Registration] = {}  # in the order in which they came
        self._waiters: deque[_Waiter] = deque()
        self._accepting = host.engine.listen(self._listener, self._arrived, host.failed)

    @staticmethod
    def check(endpoints: object) -> None:
        """See `Backend`: every relay has it."""

    @property
    def uri(self) -> Endpoint:
        """`tcp://HOST:PORT`."""
        return self._uri

    @property
    def parked(self) -> int:
        """How many connections of the hidden server wait for a visitor."""
        return len(self._parked)

    def dial_nowait(self) -> TcpConnection:
        """The connection parked longest. Raises `trio.WouldBlock`."""
        if not self._parked or self._waiters:
            raise trio.WouldBlock
        return self._take()

    async def dial(self) -> TcpConnection:
        """Wait in line for the next connection of the hidden server. Raises `trio.ClosedResourceError` once closed."""
        if self._parked and not self._waiters:  # one came since dial_nowait, and nobody stands in line before us
            return self._take()
        waiter = _Waiter()
        self._waiters.append(waiter)
        try:
            await waiter.served.wait()
        except trio.Cancelled:
            if waiter.connection is None:
                self._waiters.remove(waiter)
            else:
                self._offer(waiter.connection)
            raise
        if waiter.connection is None:
            raise trio.ClosedResourceError
        return waiter.connection

    def trim(self, keep: int) -> int:
        """Close the connections parked longest until `keep` are left."""
        surplus = max(0, self.parked - keep)
        for _ in range(surplus):
            self._take().close()
        return surplus

    def close(self) -> None:
        """Stop listening, close what is parked, send those in line away. Harmless when repeated."""
        self._accepting.release()
        self._listener.close()
        self.trim(0)
        while self._waiters:
            self._waiters.popleft().served.set()

    def _arrived(self, connection: socket.socket, peer: Any) -> None:
        """Admit one connection that claims to be the hidden server."""
        if self._host.admits is not None and not contains(self._host.admits, peer):
            reason = f"only {self._host.admits} may connect as the hidden server"
        elif len(self._parked) >= self._host.room():
            reason = f"{len(self._parked)} server connections are parked already"
        else:
            self._offer(TcpConnection(self._host.engine, connection, peer))
            self._host.attached(peer)
            return
        connection.close()
        self._host.refused(peer, reason)

    def _offer(self, connection: TcpConnection) -> None:
        """Give a connection to whoever waits longest, or park it."""
        if self._waiters:
            self._waiters.popleft().serve(connection)
        else:
            engine, look = self._host.engine, lambda: self._look(connection)
            self._parked[connection] = engine.watch(connection.socket, look, self._host.failed)

    def _take(self) -> TcpConnection:
        """Unpark the connection parked longest."""
        connection = next(iter(self._parked))
        self._parked.pop(connection).release()
        return connection

    def _look(self, connection: TcpConnection) -> None:
        """Something happened on a parked connection: has the hidden server left?"""
        if connection in self._parked and has_left(connection.socket):
            self._parked.pop(connection).release()
            connection.close()
            self._host.detached(connection.peer)


def _bind(settings: Tunnels, former: Endpoint | None, reserved: Container[int]) -> socket.socket:
    """A listener, on the former port where that is free. Raises as `bind_in_range`."""
    if former is not None and (former.port in settings.port_range or settings.port_range[0] == 0):
        with suppress(LimitReachedError):
            return bind_in_range(settings.host, range(former.port, former.port + 1), keepalive=settings.keepalive)
    return bind_in_range(settings.host, settings.port_range, keepalive=settings.keepalive, reserved=reserved)


class TcpConnection:
    """A connection that the hidden server made, for one visitor. See `ServerConnection`."""

    __slots__ = ("_engine", "peer", "socket")

    def __init__(self, engine: Engine, connection: socket.socket, peer: Any) -> None:
        self._engine = engine
        self.socket = connection
        self.peer = peer

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


class _Waiter:
    """Somebody in line for a connection."""

    __slots__ = ("connection", "served")

    def __init__(self) -> None:
        self.served = trio.Event()
        self.connection: TcpConnection | None = None

    def serve(self, connection: TcpConnection) -> None:
        self.connection = connection
        self.served.set()
