"""What is below a carrier: a socket (`connection`), or another end (`end_connection`).

A socket is read by the carrier when epoll reports it. An end delivers by itself, and the carrier takes all or nothing.
"""

from __future__ import annotations

import math
from typing import Protocol

from tunneld.engine.pump import Handler, Pump


class CarrierInput(Handler, Protocol):
    """The carrier, as its transport calls it."""

    def on_input(self, data: memoryview) -> int:
        """Bytes of an end. Returns how many are taken: all, or none; then `rearm` comes, and `receive_into`."""

    def on_writable(self) -> None:
        """After a `write` that returned False: it may take more."""

    def on_lost(self, reason: str) -> None:
        """It is gone."""


class CarrierTransport:
    """The connection below one carrier, which closes it."""

    __slots__ = ("drained", "wants_write")

    def __init__(self) -> None:
        self.drained = False  # the last read returned less than it asked for
        self.wants_write = False  # it has something to answer itself

    @property
    def has_buffered_input(self) -> bool:
        """Whether bytes were read from the kernel and not yet returned. epoll does not report them."""
        return False

    @property
    def pending_output(self) -> int:
        """Bytes that `write` accepted and the kernel did not."""
        return 0

    def attach(self, pump: Pump, handler: CarrierInput) -> None:
        """Call the carrier from now on. Raises OSError if the connection is closed already."""
        raise NotImplementedError

    def rearm(self) -> None:
        """Let the carrier read on, behind all others that are ready."""
        raise NotImplementedError

    def receive_into(self, buffer: memoryview) -> int:
        """Read into `buffer`. Returns the number of bytes, 0 at the end of the stream.

        Raises `BlockingIOError`, or OSError if the connection is broken.
        """
        raise NotImplementedError

    def write(self, outgoing: bytearray) -> bool:
        """Write from the front of `outgoing` and remove what was accepted. Returns whether everything was.

        Raises OSError if the connection is broken.
        """
        raise NotImplementedError

    def round_trip(self) -> float:
        """The shortest recent round trip in seconds; infinite if unknown."""
        return math.inf

    def idle_seconds(self) -> float:
        """Seconds since data arrived; 0 if unknown."""
        return 0.0

    def keep_unsent_below(self, size: int) -> None:
        """Ask the kernel to accept at most `size` bytes beyond what it can send now (TCP_NOTSENT_LOWAT)."""

    def limit_retransmission(self, max_rto: float, user_timeout: float) -> None:
        """Ask the kernel to retransmit at least every `max_rto` seconds (Linux 6.15), and not to give the connection up
        before `user_timeout` seconds: it counts attempts otherwise, and more frequent ones are used up sooner.
        """

    def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError
