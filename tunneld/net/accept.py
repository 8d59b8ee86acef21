"""Errors of accept(2): which one ends an accept loop, which one makes it wait, and which one it may ignore.

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
from collections.abc import Callable

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
