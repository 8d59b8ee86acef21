"""Descriptors that tunnels leave to others: however many visitors come, whoever looks after the daemon is still heard.

The kernel gives the lowest number that is free, so the number of a new connection tells how many there have been:
nothing is counted. Once it comes near the last ones, each acceptor asks for the next number before it accepts, which
costs a microsecond, and where it is one of the last, rests as it does when the kernel has none. Whoever comes waits in
the queue of the listener.
"""

from __future__ import annotations

import errno
import os

FULL = OSError(errno.EMFILE, "Too many open files: LimitNOFILE= of the unit, or ulimit -n, would allow more")
"""What the kernel would say a little later, and what to do."""


NEAR = 64
"""Descriptors before the last ones: more than others open while one connection is accepted."""


class FdReserve:
    """Of one engine."""

    def __init__(self, most: int) -> None:
        """Descriptors from the number `most` on are for others."""
        self._most = most
        self._is_near = most <= NEAR

    def update(self, fd: int) -> None:
        """A descriptor was opened."""
        if fd >= self._most - NEAR:
            self._is_near = True

    def has_spare(self, fd: int) -> bool:
        """Whether another one may be taken. `fd` is any that is open: the number of a copy is the next one."""
        if not self._is_near:
            return True
        try:
            probe = os.dup(fd)
        except OSError:
            return False
        os.close(probe)
        return probe < self._most
