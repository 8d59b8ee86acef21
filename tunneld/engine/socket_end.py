"""A plain socket as an end. Its flow reads and writes it, and is the pump's handler for it: nothing is buffered."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from tunneld.engine.end import End
from tunneld.engine.failures import TcpSocket, reset_on_close, unacknowledged

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump


class SocketEnd(End):
    """A non-blocking socket in the pump, which may still be connecting. It owns the socket."""

    __slots__ = ("connection", "fd", "pump")

    def __init__(self, pump: Pump, connection: socket.socket) -> None:
        self.pump = pump
        self.connection = connection
        self.fd = connection.fileno()

    def finish(self) -> None:
        """See `End.finish`."""
        self.connection.shutdown(socket.SHUT_WR)

    def finish_when_connected(self) -> bool:
        """See `End.finish_when_connected`. `shutdown` would disconnect a connecting socket; an empty `send` tells."""
        try:
            self.connection.send(b"")
        except BlockingIOError:
            return False
        self.finish()
        return True

    def reset(self, reason: str) -> None:
        """See `End.reset`. TCP cannot tell the peer the reason."""
        reset_on_close(self.connection)
        self.connection.close()

    def close(self, reason: str = "not needed") -> None:
        """See `End.close`. The kernel delivers what was written."""
        self.connection.close()

    def release(self) -> None:
        """See `End.release`: closing the socket sends the end of file."""
        self.connection.close()

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`."""
        return unacknowledged(self.connection)

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """See `End.tcp_connection`."""
        return self.connection
