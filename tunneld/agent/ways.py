"""The way to one visitor: a connection of its own, or a channel of a carrier. Whoever serves it knows no difference."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import trio

from tunneld.relay.engine import Engine, Relay, RelayEnd

Take = Callable[["VisitorConnection", bytes], None]
"""A visitor came: the way to it, from now on the callee's, and the visitor's PROXY header."""


class VisitorConnection(Protocol):
    """Where a visitor's bytes come from, positioned behind the PROXY header unless that is to be kept."""

    def join(self, server: socket.socket, *, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> Relay:
        """Relay between the visitor and `server`; see `Engine.join`. Both belong to the relay from now on."""

    def stream(self) -> trio.abc.HalfCloseableStream:
        """The visitor as a stream, for a program that serves it itself."""

    def close(self, reason: str) -> None:
        """Let go of the visitor; it is told why, where there is a way to."""


class SocketVisitor:
    """A connection to the relay that serves this visitor alone."""

    __slots__ = ("_connection", "_engine")

    def __init__(self, engine: Engine, connection: socket.socket) -> None:
        self._engine = engine
        self._connection = connection

    def join(self, server: socket.socket, *, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> Relay:
        """Hand both sockets to the engine."""
        return self._engine.join(self._connection, server, linger=linger, on_end=on_end)

    def stream(self) -> trio.abc.HalfCloseableStream:
        """A `trio.SocketStream`."""
        return trio.SocketStream(trio.socket.from_stdlib_socket(self._connection))

    def close(self, reason: str) -> None:
        """Close the connection; TCP has no words."""
        self._connection.close()
