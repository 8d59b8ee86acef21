"""Which errors of accept(2) mean what, how an owner hears of its bugs, how a peer hears of a reset."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import Any, Protocol

import structlog

from tunneld.engine.engine import FailureCallback
from tunneld.errors import reason_of

OUR_FAULTS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"Not a listening socket (any more). All other errors are those of the one connection that accept would have returned."

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # on, 0 seconds

log = structlog.get_logger("relay")


def tell_failure(on_failure: FailureCallback, error: Exception) -> None:
    """Hand a bug in an owner's callback to the owner; a bug in that, too, is only logged."""
    try:
        on_failure(error)
    except Exception as second:
        log.exception("could not tell an owner of its failure", exc_info=second)


def log_shortage(error: OSError) -> None:
    """Say once that an acceptor has to rest."""
    log.warning("could not accept connections", reason=reason_of(error))


class HasOptions(Protocol):
    """A socket, the standard library's or Trio's."""

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        """Set one option, as the standard library does."""


def reset_on_close(connection: HasOptions) -> None:
    """Make the coming close send RST instead of FIN. Harmless where there is nobody left to hear it."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
