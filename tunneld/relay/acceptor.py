"""The handlers that end in somebody's callback: listeners, and connections that are parked."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from tunneld.errors import SHORTAGES

from .engine import FailureCallback
from .failures import OUR_FAULTS, log_shortage, tell_failure
from .room import FULL

if TYPE_CHECKING:
    from .pump import Pump

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
