"""The pump's handlers for sockets that it does not relay: listeners, and parked connections.

Also the descriptor reserve, which keeps the last descriptors of the process out of reach of visitors, so that the
control port, a reload and a restart still work. The kernel assigns the lowest free number, so the number of a new
descriptor tells how many are in use and nothing has to be counted. Once a number comes close to the reserve, each
acceptor probes for the next number before it accepts, which costs a microsecond. If that number is reserved, the
acceptor waits as it does when the kernel has no descriptor left, and clients wait in the listener's queue.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from tunneld.engine.engine import FailureCallback
from tunneld.engine.failures import log_shortage, report_failure
from tunneld.errors import SHORTAGES
from tunneld.net.accept import NOT_LISTENING, AcceptShortage, unmap_address

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump

WRITE_EVENT: Final = select.EPOLLOUT
"""Space in the send buffer: of no interest for a parked connection."""

RESERVE_REACHED: Final = OSError(
    errno.EMFILE, "Too many open files: raise LimitNOFILE= in the systemd unit, or ulimit -n"
)
"""What the kernel would report a little later, and what to do."""

PROBE_MARGIN: Final = 64
"""Descriptors below the reserve from which on acceptors probe: more than the rest of the process opens while one
connection is accepted.
"""

TCP_ENDED: Final = {7, 8}
"""The states CLOSE and CLOSE_WAIT of tcpi_state, see tcp(7)."""


class Acceptor:
    """The pump's handler for a listening socket: it accepts in batches, without a task per connection."""

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
        self._is_ipv6 = listener.family == socket.AF_INET6
        self._fd = listener.fileno()
        self._on_connection = on_connection
        self._failure = on_failure
        self._released = False
        self._shortage = AcceptShortage(log_shortage)  # it ends once the listener's queue is empty

    def release(self) -> None:
        """See `Registration.release`."""
        self._released = True
        self._pump.timers.forget(self)
        self._pump.unregister(self._fd, self)

    def on_event(self, events: int) -> None:
        """Accept until the queue is empty, the batch is full or descriptors run out."""
        reserve = self._pump.fd_reserve
        for _ in range(self._pump.limits.accept_batch):
            if self._released:
                return
            if reserve.is_near and not reserve.has_spare(self._fd):
                self._back_off(RESERVE_REACHED)
                return
            try:
                connection, address = self._accept()
            except BlockingIOError:
                if self._shortage.active:
                    self._shortage.end()
                return
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._back_off(error)
                    return
                if error.errno in NOT_LISTENING:
                    raise
                continue  # the client closed this connection before it was accepted
            reserve.update(connection.fileno())
            try:
                self._on_connection(connection, address)
            except Exception as error:
                connection.close()
                self.on_failure(error)
        self._pump.rearm(self._fd)

    def on_deadline(self) -> None:
        """The back-off is over: let epoll report the listener again."""
        self._pump.rearm(self._fd)

    def on_failure(self, error: Exception) -> None:
        """`on_connection` raised, or the socket does not listen."""
        report_failure(self._failure, error)

    def on_stop(self) -> None:
        """The pump stops."""
        self.release()

    def _accept(self) -> tuple[socket.socket, Any]:
        """Do what `socket.accept` does, except that it asks for the kind of the socket each time and looks the numbers
        up in enumerations, which takes longer than the system call.
        """
        fd, address = self._listener._accept()  # type: ignore[attr-defined]  # typeshed does not know it
        connection = socket.socket(*self._kind, fd)
        connection.setblocking(False)
        return connection, unmap_address(address) if self._is_ipv6 else address

    def _back_off(self, error: OSError) -> None:
        """Try again after `accept_backoff` seconds."""
        self._shortage.begin(error)
        self.deadline = trio.current_time() + self._pump.limits.accept_backoff
        self._pump.timers.watch(self)


class SocketWatch:
    """The pump's handler for a parked connection: it reports events to the owner and reads nothing."""

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
        """Call the owner, except for mere space in the send buffer."""
        if events & ~WRITE_EVENT:
            self._on_event()

    def on_failure(self, error: Exception) -> None:
        """`on_event` of the owner raised."""
        report_failure(self._failure, error)

    def on_stop(self) -> None:
        """The pump stops."""
        self.release()


def peer_closed(connection: socket.socket) -> bool:
    """Whether the peer ended or reset the connection, and no byte is left to read. Reads nothing.

    A peer that sent bytes before it closed does not count as closed until they are read.
    """
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def peer_ended(connection: socket.socket) -> bool:
    """Whether the peer ended or reset the connection, even if bytes that it sent before are left to read."""
    if sys.platform != "linux":
        return peer_closed(connection)
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in TCP_ENDED
    except OSError:
        return True


class FdReserve:
    """The descriptors that visitors of one engine do not get."""

    def __init__(self, limit: int) -> None:
        """Descriptors from the number `limit` on are reserved."""
        self._limit = limit
        self.is_near = limit <= PROBE_MARGIN  # ask `has_spare` before another one is opened

    def update(self, fd: int) -> None:
        """A descriptor was opened."""
        if fd >= self._limit - PROBE_MARGIN:
            self.is_near = True

    def has_spare(self, fd: int) -> bool:
        """Whether another descriptor may be opened. `fd` is any open one: a copy of it gets the next free number."""
        if not self.is_near:
            return True
        try:
            probe = os.dup(fd)
        except OSError:
            return False
        os.close(probe)
        return probe < self._limit
