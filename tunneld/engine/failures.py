"""How the engines report failures: a bug to the owner of a callback, a shortage to the log, a reset to the peer."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import termios
from typing import Any, Final, Protocol

from tunneld.engine.engine import FailureCallback
from tunneld.errors import reason_of
from tunneld.log import Logger

RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""The value of SO_LINGER that makes close(2) send RST: on, 0 seconds."""

log = Logger("engine")


def report_failure(on_failure: FailureCallback, error: Exception) -> None:
    """Pass an exception of a callback to its owner's `on_failure`; an exception of that is logged."""
    try:
        on_failure(error)
    except Exception as second:
        log.exception("on_failure callback failed: internal error", exc_info=second)


def log_shortage(error: OSError) -> None:
    """Log that an acceptor has to wait for descriptors or socket memory."""
    log.warning("could not accept connections", reason=reason_of(error))


class TcpSocket(Protocol):
    """A socket of the standard library or of Trio."""

    def fileno(self) -> int:
        """The descriptor."""

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        """Set one option, as the standard library does."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Return one option, as the standard library does."""


def unacknowledged(connection: TcpSocket) -> int:
    """Bytes written to a connection that its peer has not acknowledged: a reset would discard them. 0 where the system
    does not tell.
    """
    if sys.platform != "linux":  # SIOCOUTQ, see tcp(7)
        return 0
    with contextlib.suppress(OSError):
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def reset_on_close(connection: TcpSocket) -> None:
    """Make the next close of this socket send RST instead of FIN. Does nothing on a closed or broken socket."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
