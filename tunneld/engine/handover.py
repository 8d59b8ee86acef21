"""The state of a relay between two engines: exported from one, imported into another, perhaps in another process.

The state is the two sockets and what the sockets do not know themselves: how many bytes have passed, which end of file
has been passed on, and the bytes that were read from one side and not yet delivered to the other. No byte is lost, and
an export does not wait for a slow reader: undelivered bytes are part of the state.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlowState:
    """One direction of a relay."""

    moved: int = 0
    "Bytes delivered."

    done: bool = False
    "Whether the end of file has been passed on."

    held: bytes = b""
    "Bytes read and not delivered."


@dataclass(frozen=True, slots=True)
class RelayState:
    """A relay outside any engine. Its holder owns both sockets."""

    visitor: socket.socket
    server: socket.socket
    up: FlowState
    down: FlowState
    linger: float
    "Seconds, as in `Engine.join`."

    rest: float | None = None
    "Seconds of `linger` that are left, if one side has ended; else None."

    def close(self) -> None:
        """Close both sockets instead of importing the relay."""
        self.visitor.close()
        self.server.close()
