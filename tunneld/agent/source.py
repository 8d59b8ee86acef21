"""What the agent's connections to the relay have in common, whether each serves one visitor or many.

A `ConnectionSource` keeps connections to the server side of one tunnel. Each visitor arrives as a `VisitorConnection`:
a connection of its own (`SocketVisitor`) or an end such as a channel of a carrier (`EndVisitor`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.engine.end import End
from tunneld.engine.engine import FailureCallback
from tunneld.engine.failures import reset_on_close

VisitorCallback = Callable[["VisitorConnection", bytes], None]
"""Gets each visitor, which the callee owns from now on, and its PROXY header."""


class VisitorConnection(Protocol):
    """The connection to one visitor, positioned behind the PROXY header unless that is to be kept. Exactly one of its
    members is used, once.
    """

    @property
    def end(self) -> socket.socket | End:
        """What the engine joins to the local server, and owns from then on."""

    def stream(self) -> trio.abc.HalfCloseableStream:
        """Return the visitor as a stream, which the caller owns."""

    def close(self, reason: str) -> None:
        """Close the connection. The relay is told the reason if the connection can carry one."""


class SocketVisitor:
    """A visitor on a connection of its own. Implements `VisitorConnection`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @property
    def end(self) -> socket.socket:
        """The socket itself."""
        return self._connection

    def stream(self) -> trio.abc.HalfCloseableStream:
        """Return a `trio.SocketStream`."""
        return trio.SocketStream(trio.socket.from_stdlib_socket(self._connection))

    def close(self, reason: str) -> None:
        """Reset the connection, so that the visitor does not take it for complete; TCP cannot carry the reason."""
        reset_on_close(self._connection)
        self._connection.close()


@dataclass(frozen=True, slots=True)
class SourceEvents:
    """What a source of connections calls."""

    on_visitor: VisitorCallback
    on_trouble: Callable[[str], None]
    """Connections were lost or could not be made, and why, as a sentence. The source has paused."""
    on_failure: FailureCallback
    """A callback raised: a bug."""
    on_shortage: Callable[[str], None] = lambda _reason: None
    """This machine has no descriptor or port for another connection, and why, as a sentence. The source has paused."""


class ConnectionSource(Protocol):
    """The connections to the server side of one tunnel: a pool of parked ones, or its part in carriers."""

    @property
    def size(self) -> int:
        """How many parked connections the relay should keep; 0 for carriers."""

    @property
    def parked(self) -> int:
        """How many connections are ready for visitors, or are being made."""

    def resume(self) -> None:
        """Dial what is missing, now and whenever something is missing, until trouble or `pause`."""

    def pause(self) -> None:
        """Dial nothing until `resume`; existing connections stay."""

    def resize(self) -> bool:
        """Shrink if larger than needed; returns whether the relay has parked connections to trim."""

    def probe(self) -> None:
        """Check the existing connections: the network changed or the machine was suspended, and they may be dead."""

    def close(self) -> None:
        """Close every connection that serves no visitor."""

    def withdraw(self) -> None:
        """Take no more visitors, and tell the relay if that is possible on the connections themselves. Visitors that
        the relay sends before it knows still arrive.
        """

    async def wait_withdrawn(self) -> None:
        """Wait, after `withdraw`, until the relay knows: visitors that were on their way have arrived."""

    async def wait_closed(self) -> None:
        """Wait, after `withdraw`, until no connection is left."""
