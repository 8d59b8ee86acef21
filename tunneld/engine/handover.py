"""Relays that change engines: lifted out of one, put down in another, perhaps in another process.

A lifted relay is its two sockets and what the sockets do not know themselves: how much has passed, which end has been
passed on, and the octets that were read from one and not yet taken by the other. No octet is lost and none waits for a
slow reader: what was on its way goes along.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlowState:
    """One direction: octets delivered, whether its end was passed on, and what was read and not delivered."""

    moved: int = 0
    done: bool = False
    held: bytes = b""


@dataclass(frozen=True, slots=True)
class RelayState:
    """A relay in nobody's hands. Whoever has it owns both sockets."""

    visitor: socket.socket
    server: socket.socket
    up: FlowState
    down: FlowState
    linger: float  # seconds, as in `Engine.join`
    rest: float | None = None  # of those, where one end has been passed on: until the next octet must have come

    def close(self) -> None:
        """Nobody goes on with it."""
        self.visitor.close()
        self.server.close()
