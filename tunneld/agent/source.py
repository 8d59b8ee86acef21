"""The way to one visitor: a connection of its own, or a channel of a carrier. Whoever serves it knows no difference.

What a keeper looks after: the connections to the relay by which visitors come.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.engine.engine import Engine, FailureCallback, Relay, RelayEnd

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


MAX_DIALS_AT_ONCE = 8
"""Connections being made: half of what a relay takes from one source unless told otherwise. Until it has shown its key,
each is a stranger there.
"""


@dataclass(frozen=True, slots=True)
class SourceEvents:
    """Whom a supply tells."""

    on_visitor: Take
    on_trouble: Callable[[str], None]
    """A connection ended that was wanted, or could not be made, and why."""
    on_failure: FailureCallback
    """A bug in a callback."""
    on_unknown_tunnel: Callable[[], None] = lambda: None
    """The relay answered, and does not know the tunnel: whoever waits for the relay need not wait any more."""


class ConnectionSource(Protocol):
    """Connections to the server side of one tunnel: a pool of parked ones, or carriers."""

    @property
    def description(self) -> str:
        """What it consists of, for people."""

    @property
    def size(self) -> int:
        """How many parked connections the relay should keep."""

    @property
    def parked(self) -> int:
        """How many connections stand ready, or are on their way to."""

    def resume(self) -> None:
        """Dial what lacks, now and whenever something does, until there is trouble or somebody calls `rest`."""

    def pause(self) -> None:
        """Dial nothing until `resume`; what stands goes on."""

    def resize(self) -> bool:
        """Shrink where there is more than needed; tells whether the relay has parked connections to trim."""

    def probe(self) -> None:
        """The network changed, or the machine was asleep: what stands may have been cut off without a word."""

    def close(self) -> None:
        """Let go of everything that serves no visitor."""

    def withdraw(self) -> None:
        """Want no more visitors, and say so where that can be said on the connections themselves. Whom the relay sends
        before it has heard of it comes all the same.
        """

    async def wait_withdrawn(self) -> None:
        """Wait until it has: those who were on their way are here then."""

    async def wait_closed(self) -> None:
        """Wait, after `withdraw`, until no connection is left."""
