"""accept(2): its errors, and the addresses of what it returns.

**Addresses.** A dual-stack listener reports IPv4 peers as `::ffff:192.0.2.1`. Every accept loop turns that into
`192.0.2.1` with `unmap_address`, and `peer_address` and `local_address` do it where a socket is asked again. The rest
of the program never sees an IPv4-mapped address of a connection, so it cannot forget that the two are the same.

**Errors.** Which one ends an accept loop, which one makes it wait, and which one it may ignore.

All accept loops of the program follow this one rule: the pump's acceptor and the portable engine's task (`engine`), and
`ReloadableListener`.

    shortage                no descriptors or no socket memory are left: log it once, wait `ACCEPT_BACKOFF`, try again
    not a listening socket  a bug of the owner, or the listener was closed: stop
    a lost connection       accept(2) reports an error of the connection that it would have returned: go on at once

An error that is in none of these groups is treated as a lost connection by the engines, as accept(2) suggests, and as a
shortage by `ReloadableListener`, which serves few connections and would rather wait than spin.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import trio

ACCEPT_BACKOFF = 0.1
"""Seconds between two tries during a shortage: long enough not to spin, short enough that clients do not notice."""

NOT_LISTENING = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"""The socket does not listen (any more)."""

CONNECTION_LOST = frozenset(
    {
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
"""The client or the network ended the connection before it was accepted."""


MAPPED_PREFIX = "::ffff:"


def unmap_address(address: Any) -> Any:
    """An address as the kernel reports it, with an IPv4-mapped one (`::ffff:192.0.2.1`) as IPv4: host and port."""
    if isinstance(address, tuple) and address[0].startswith(MAPPED_PREFIX) and "." in address[0]:
        return address[0].removeprefix(MAPPED_PREFIX), address[1]
    return address


def peer_address(connection: socket.socket | trio.socket.SocketType) -> Any:
    """What `getpeername` returns, see `unmap_address`. Raises OSError if the peer has left."""
    return unmap_address(connection.getpeername())


def local_address(connection: socket.socket | trio.socket.SocketType) -> Any:
    """What `getsockname` returns, see `unmap_address`."""
    return unmap_address(connection.getsockname())


class AcceptShortage:
    """The state of an accept loop that may run out of descriptors or memory: one spell of failures is one log line."""

    def __init__(self, report: Callable[[OSError], None]) -> None:
        """`report` logs the error that begins a spell."""
        self.active = False
        self._report = report

    def begin(self, error: OSError) -> None:
        """A try failed. The caller waits `ACCEPT_BACKOFF` before the next one."""
        if not self.active:
            self.active = True
            self._report(error)

    def end(self) -> None:
        """Connections can be accepted again."""
        self.active = False
