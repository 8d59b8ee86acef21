"""The connection under a carrier: a plain socket or one in TLS, read and written without waiting.

In TLS, OpenSSL works on buffers (`tls`) and the kernel is asked once for many records: `ssl.SSLSocket` makes two system
calls to read a record of 16 KiB and one to write it, and each of those wakes the peer for that little. Bulk and small
requests both cost about an eighth less processor time this way.
"""

from __future__ import annotations

import math
import socket
import sys

from tunneld.tls.connection import TlsSocket

TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
"""Linux's number, which Python's `socket` does not name everywhere."""
TCP_RTO_MAX_MS = 44
TCP_USER_TIMEOUT = 18
LONGEST = (1 << 31) - 1
"""Milliseconds that the kernel can be told: 24 days."""
MIN_RTT = 148
"""Where `struct tcp_info` of Linux has the shortest round trip lately, in microseconds."""
LAST_DATA_RECEIVED = 52
"""Where it has the time since octets arrived, in milliseconds."""
RECORD = 16 * 1024
"""Octets in a TLS record at most (RFC 8446 §5.1): the rest of one may complete it beside what is read now."""


class Connection:
    """A connected stream socket, non-blocking; the link owns it."""

    __slots__ = ("connection", "drained")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.drained = False  # the last read found less than it asked for

    @property
    def has_buffered_input(self) -> bool:
        """Whether something was taken from the kernel and not given out: epoll will not tell of that."""
        return False

    @property
    def pending_output(self) -> int:
        """Octets that `write` took and the kernel did not."""
        return 0

    def receive_into(self, buffer: memoryview) -> int:
        """Octets read, 0 at the end. Raises `BlockingIOError`, or OSError where the connection broke."""
        count = self.connection.recv_into(buffer)
        self.drained = count < len(buffer)
        return count

    def write(self, outgoing: bytearray) -> bool:
        """Take octets from the front of `outgoing`; whether the kernel took all there were, and would take more.

        Raises OSError where the connection broke.
        """
        sent = 0
        try:
            with memoryview(outgoing) as view:
                while sent < len(view):
                    sent += self.connection.send(view[sent:])
        except BlockingIOError:
            return False
        finally:
            del outgoing[:sent]
        return True

    def round_trip(self) -> float:
        """Seconds of the shortest round trip lately, infinite where that is not known: what the kernel has measured
        (tcpi_min_rtt of TCP_INFO, tcp(7)).
        """
        known = self._ask_kernel(MIN_RTT)
        return math.inf if known is None else known / 1e6

    def idle_seconds(self) -> float:
        """Seconds since octets arrived, 0 where that is not known (tcpi_last_data_recv)."""
        known = self._ask_kernel(LAST_DATA_RECEIVED)
        return 0.0 if known is None else known / 1e3

    def _ask_kernel(self, place: int) -> int | None:
        """A number of 32 bits in `struct tcp_info`; None where there is none."""
        try:
            info = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, place + 4)
        except OSError:
            return None  # no TCP: a socket pair
        return int.from_bytes(info[place:], sys.byteorder) if len(info) == place + 4 else None

    def keep_unsent_below(self, octets: int) -> None:
        """Ask the kernel not to take more than so many octets ahead of what it can send."""
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, octets)
        except OSError:
            return  # no TCP: a socket pair

    def resend_within(self, seconds: float, give_up: float) -> None:
        """Ask the kernel to send again at least so often, where it can be told (Linux 6.15), and not to `give_up`
        before so many seconds, since it counts tries.
        """
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, round(1000 * seconds))
            self.connection.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, min(round(1000 * give_up), LONGEST))
        except OSError:
            return

    def close(self) -> None:
        """Close it, without a goodbye: the peer knows an end when it sees one, and every channel has an end of its
        own.
        """
        self.connection.close()


class TlsConnection(Connection):
    """The same in TLS, after the handshake."""

    __slots__ = ("_tls",)

    def __init__(self, tls: TlsSocket) -> None:
        super().__init__(tls.connection)
        self._tls = tls

    @property
    def has_buffered_input(self) -> bool:
        """See `Connection.ahead`."""
        return self._tls.has_buffered_input

    @property
    def pending_output(self) -> int:
        """See `Connection.unsent`: no more than was in `outgoing` once, and what OpenSSL has to say for itself."""
        return self._tls.pending_output

    def receive_into(self, buffer: memoryview) -> int:
        """See `Connection.receive_into`. OpenSSL copies what it is fed, so the same buffer takes what it makes of that."""
        tls = self._tls
        while not tls.ended:
            if not tls.has_buffered_input:
                space = len(buffer) - RECORD
                count = self.connection.recv_into(buffer, space)
                self.drained = count < space
                if not count:
                    return 0
                tls.feed(buffer[:count])
            if count := tls.decipher(buffer):
                self.drained &= not tls.ended  # a goodbye wakes nobody again: read on, and hear of it
                return count
        return 0

    def write(self, outgoing: bytearray) -> bool:
        """See `Connection.write`: all of it is enciphered, and the next is when the kernel has it."""
        tls = self._tls
        if not tls.flush():
            return False
        with memoryview(outgoing) as view:
            tls.write(view)
        outgoing.clear()
        return tls.flush()


def connection_over(connection: socket.socket | TlsSocket) -> Connection:
    """A link over whichever of the two it is."""
    return TlsConnection(connection) if isinstance(connection, TlsSocket) else Connection(connection)
