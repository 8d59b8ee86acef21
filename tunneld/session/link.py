"""The connection under a carrier: a plain socket or one in TLS, read and written without waiting.

TLS is `ssl.SSLSocket` on the non-blocking descriptor, after its handshake. Three things differ from a plain socket,
and all of them stay in this file: OpenSSL takes a record from the kernel and may hold the rest of it (`holds_more`:
epoll will not tell of that); it says WANT_READ and WANT_WRITE where a socket says EAGAIN; and a write that was refused
must be repeated with the same octets in front, which is why the carrier only ever appends behind them.
"""

from __future__ import annotations

import math
import socket
import ssl
import sys

import trio

TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
"""Linux's number, which Python's `socket` does not name everywhere."""
MIN_RTT = 148
"""Where `struct tcp_info` of Linux has the shortest round trip lately, in microseconds."""


class Link:
    """A connected stream socket, non-blocking."""

    __slots__ = ("_tls", "connection")

    def __init__(self, connection: socket.socket) -> None:
        """A `socket.socket`, or an `ssl.SSLSocket` whose handshake is done. The link owns it."""
        self.connection = connection
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None

    @property
    def holds_more(self) -> bool:
        """Octets have been taken from the kernel and not been read yet."""
        return self._tls is not None and self._tls.pending() > 0

    def receive_into(self, buffer: memoryview) -> int:
        """Octets read, 0 at the end; fewer than fit: there are no more now. Raises `BlockingIOError`, or OSError where
        the connection broke.
        """
        return self.connection.recv_into(buffer) if self._tls is None else self._receive_records(buffer)

    def send(self, data: memoryview) -> int:
        """Octets taken. Raises `BlockingIOError`, or OSError where the connection broke."""
        try:
            return self.connection.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def _receive_records(self, buffer: memoryview) -> int:
        """TLS is read by the record, of 16 KiB at most: as many as fit, so that what they hold leaves in one write."""
        filled = 0
        while filled < len(buffer):
            try:
                count = self.connection.recv_into(buffer[filled:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not filled:
                    raise BlockingIOError from None
                break
            except OSError:
                if not filled:
                    raise
                break  # first what came before it; the next read says it again
            if not count:
                break
            filled += count
        return filled

    def now(self) -> float:
        """See `Pace`."""
        return trio.current_time()

    def round_trip(self) -> float:
        """See `Pace`: what the kernel has measured (tcpi_min_rtt of TCP_INFO, tcp(7))."""
        try:
            info = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT + 4)
        except OSError:
            return math.inf  # no TCP: a socket pair
        return int.from_bytes(info[MIN_RTT:], sys.byteorder) / 1e6 if len(info) == MIN_RTT + 4 else math.inf

    def keep_unsent_below(self, octets: int) -> None:
        """Ask the kernel not to take more than so many octets ahead of what it can send."""
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, octets)
        except OSError:
            return  # no TCP: a socket pair

    def close(self) -> None:
        """Close it, without a goodbye: the peer knows an end when it sees one."""
        self.connection.close()
