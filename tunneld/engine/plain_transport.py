"""A plain TCP connection with the interface of a `TlsSocket`: for code that looks at what a visitor sends.

A connection that is only relayed is a `SocketEnd`, which is faster: its bytes need not pass through this process.
"""

from __future__ import annotations

import socket
from typing import Final

HEADER_ROOM: Final = 4
"""Bytes: a carrier writes what was read, and the header of a frame, at once."""
AT_ONCE: Final = 16 * 1024
"""Bytes that are worth a system call of their own: copying them takes as long. Less waits for what else is written."""


class PlainTransport:
    """A connected non-blocking socket, which it owns."""

    __slots__ = ("_failure", "_unsent", "connection", "ended")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.ended = False  # the end of file was read
        self._unsent = bytearray()
        self._failure: OSError | None = None  # of a write, not reported yet

    @property
    def takes_pipes(self) -> bool:
        """Whether the kernel moves bytes between this connection and a pipe on every system: that is so for TCP."""
        return self.connection.family != socket.AF_UNIX

    @property
    def pending_output(self) -> int:
        """Bytes that the kernel does not have yet."""
        return len(self._unsent)

    def decrypt(self, _plain: memoryview) -> int:
        """Nothing was read before the event loop began."""
        return 0

    def receive_into(self, raw: memoryview, plain: memoryview) -> tuple[int, int]:
        """Read once from the kernel into `plain`: as many bytes as `raw` has, without a header. Returns the number of
        bytes, twice; the first one is `len(raw)` if that was all that could be read at once.

        Raises `BlockingIOError`, or OSError if the connection is broken.
        """
        size = len(raw)
        count = self.connection.recv_into(plain, size - HEADER_ROOM)
        self.ended = not count
        return size if count == size - HEADER_ROOM else count, count

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` to the pending output. Much at a time goes to the kernel at once, without a copy."""
        if len(data) >= AT_ONCE and not self._unsent and self._failure is None:
            try:
                sent = self.connection.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._failure, sent = error, 0
            data = memoryview(data)[sent:]
        self._unsent += data

    def finish(self) -> None:
        """Nothing: TCP's own end of file follows."""

    def flush(self) -> bool:
        """Write pending output to the kernel; returns whether that was all of it. Raises OSError."""
        unsent = self._unsent
        if self._failure is not None:
            unsent.clear()
            raise self._failure
        try:
            while unsent:
                sent = self.connection.send(unsent)
                del unsent[:sent]
        except BlockingIOError:
            return False
        except OSError:
            unsent.clear()
            raise
        return True

    def flush_if_possible(self) -> None:
        """Flush a connection that is being given up: errors are ignored."""
        try:
            self.flush()
        except OSError:
            return

    def close(self) -> None:
        """Close the socket."""
        self.connection.close()
