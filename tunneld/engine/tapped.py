"""A plain connection whose bytes are looked at as they pass, by the inspector of the agent.

    relay ──► write ──► tap.on_written ──► send          relay ◄── tap.on_read ◄── receive

With a `TlsEnd` around it, it is one side of a relay like any other. Relays without a tap know nothing of this: their
bytes still go from kernel to kernel.
"""

from __future__ import annotations

import socket
from typing import Protocol

from tunneld.engine.plain_transport import PlainTransport


class Tap(Protocol):
    """Gets the bytes of one connection. Must neither block nor raise; `data` is valid only during the call."""

    def on_written(self, data: bytes | bytearray | memoryview) -> None:
        """These bytes are sent to the peer."""

    def on_read(self, data: bytes | bytearray | memoryview) -> None:
        """These bytes have come from the peer."""


class TappedTransport(PlainTransport):
    """A connected non-blocking socket, which it owns, and a tap."""

    __slots__ = ("_tap",)

    def __init__(self, connection: socket.socket, tap: Tap) -> None:
        super().__init__(connection)
        self._tap = tap

    @property
    def takes_pipes(self) -> bool:
        """See `PlainTransport.takes_pipes`. The tap sees every byte."""
        return False

    def receive_into(self, raw: memoryview, plain: memoryview) -> tuple[int, int]:
        """See `PlainTransport.receive_into`."""
        count = self.connection.recv_into(plain, len(raw))
        if count:
            self._tap.on_read(plain[:count])
        else:
            self.ended = True
        return count, count

    def write(self, data: bytes | memoryview) -> None:
        """See `PlainTransport.write`."""
        self._tap.on_written(data)
        self._unsent += data
