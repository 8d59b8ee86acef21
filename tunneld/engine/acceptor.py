"""The handlers that end in somebody's callback: listeners, and connections that are parked.

What an owner can learn of a watched connection without taking a byte from it.

Descriptors that tunnels leave to others: however many visitors come, whoever looks after the daemon is still heard.

The kernel gives the lowest number that is free, so the number of a new connection tells how many there have been:
nothing is counted. Once it comes near the last ones, each acceptor asks for the next number before it accepts, which
costs a microsecond, and where it is one of the last, rests as it does when the kernel has none. Whoever comes waits in
the queue of the listener.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from tunneld.engine.engine import FailureCallback
from tunneld.engine.failures import OUR_FAULTS, log_shortage, tell_failure
from tunneld.errors import SHORTAGES

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump

EPOLLOUT = select.EPOLLOUT


class Acceptor:
    """A listening socket: connections leave the kernel in batches, without a task each."""

    deadline = 0.0

    def __init__(
        self,
        pump: Pump,
        listener: socket.socket,
        on_connection: Callable[[socket.socket, Any], None],
        on_failure: FailureCallback,
    ) -> None:
        """See `Engine.listen`."""
        self._pump = pump
        self._listener = listener
        self._kind = int(listener.family), int(listener.type), listener.proto
        self._fd = listener.fileno()
        self._on_connection = on_connection
        self._failure = on_failure
        self._released = False
        self._short = False  # a shortage was logged, and is not logged again before everybody has come who waits

    def release(self) -> None:
        """See `Registration.release`."""
        self._released = True
        self._pump.timers.forget(self)
        self._pump.detach(self._fd, self)

    def on_event(self, events: int) -> None:
        """Accept until nobody waits, the batch is full or there is no room."""
        room = self._pump.fd_reserve
        for _ in range(self._pump.limits.accept_batch):
            if self._released:
                return
            if not room.has_spare(self._fd):
                self._rest(FULL)
                return
            try:
                connection, address = self._accept()
            except BlockingIOError:
                self._short = False
                return
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._rest(error)
                    return
                if error.errno in OUR_FAULTS:
                    raise
                continue  # it concerns the one who would have come
            room.update(connection.fileno())
            try:
                self._on_connection(connection, address)
            except Exception as error:
                connection.close()
                self.on_failure(error)
        self._pump.rearm(self._fd)

    def on_deadline(self) -> None:
        """The rest is over: let epoll tell again who waits."""
        self._pump.rearm(self._fd)

    def on_failure(self, error: Exception) -> None:
        """A callback raised, or the listener is none."""
        tell_failure(self._failure, error)

    def on_stop(self) -> None:
        """The pump stops."""
        self.release()

    def _accept(self) -> tuple[socket.socket, Any]:
        """What `socket.accept` does, but that one asks each time what kind of socket it is and looks the numbers up in
        enumerations, which takes longer than the system call.
        """
        fd, address = self._listener._accept()  # type: ignore[attr-defined]  # typeshed does not know it
        connection = socket.socket(*self._kind, fd)
        connection.setblocking(False)
        return connection, address

    def _rest(self, error: OSError) -> None:
        """Wait for better times."""
        if not self._short:
            self._short = True
            log_shortage(error)
        self.deadline = trio.current_time() + self._pump.limits.accept_backoff
        self._pump.timers.watch(self)


class SocketWatch:
    """A parked connection that belongs to somebody else: only its events are of interest."""

    __slots__ = ("_failure", "_fd", "_on_event", "_pump")

    def __init__(self, pump: Pump, fd: int, on_event: Callable[[], None], on_failure: FailureCallback) -> None:
        """See `Engine.watch`."""
        self._pump = pump
        self._fd = fd
        self._on_event = on_event
        self._failure = on_failure

    def release(self) -> None:
        """See `Registration.release`."""
        self._pump.detach(self._fd, self)

    def on_event(self, events: int) -> None:
        """Tell the owner, except of mere room to write."""
        if events & ~EPOLLOUT:
            self._on_event()

    def on_failure(self, error: Exception) -> None:
        """The callback raised."""
        tell_failure(self._failure, error)

    def on_stop(self) -> None:
        """The pump stops."""
        self.release()


def peer_closed(connection: socket.socket) -> bool:
    """Whether the peer ended or broke the connection with nothing left to read.

    A peer that spoke before it ended has not left yet: somebody may still want to hear it.
    """
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


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
