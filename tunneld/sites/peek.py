"""Waits for the first bytes of an accepted connection, and leaves them there.

The bytes stay in the kernel (MSG_PEEK), so a connection can still be passed on untouched, with splice. While they are
incomplete, SO_RCVLOWAT makes the kernel report the connection only once there is more than was seen: a client that
sends one byte at a time costs one look for each, and no more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Generic, TypeVar

from tunneld.engine.acceptor import peer_ended
from tunneld.engine.engine import FailureCallback, Registration
from tunneld.engine.failures import report_failure
from tunneld.engine.pump import Pump
from tunneld.errors import RemoteProtocolError
from tunneld.wire.client_hello import MAX_HELLO_BYTES

MAX_PEEK_BYTES = MAX_HELLO_BYTES
"""Bytes that are looked at: of the longest ClientHello; a PROXY protocol header is shorter."""

Found = TypeVar("Found")


class PeekReader(Generic[Found]):
    """One connection, until its first bytes are complete, refused, or late. The caller owns the connection."""

    def __init__(
        self,
        engine: Pump,
        connection: socket.socket,
        deadline: float,
        parse: Callable[[bytes], Found | None],
        on_found: Callable[[Found], None],
        on_refused: Callable[[Exception | None], None],
        on_failure: FailureCallback,
        waiting: set[PeekReader[Found]],
    ) -> None:
        """Start waiting until `deadline` (Trio's clock). One of the callbacks follows, once, perhaps at once.

        Args:
            engine: reports the connection, and the deadline.
            connection: accepted, and unread.
            deadline: when `on_refused` is called with None.
            parse: reads all bytes that have arrived; None: there must be more. Raises `RemoteProtocolError`.
            on_found: called with what `parse` returned. The bytes are still unread.
            on_refused: called with the error of `parse` or of the connection.
            on_failure: called with the exception of a bug in `parse` or `on_found`.
            waiting: holds the reader until then.
        """
        self.connection = connection
        self.deadline = deadline
        self._engine = engine
        self._parse = parse
        self._on_found = on_found
        self._on_refused = on_refused
        self._on_failure = on_failure
        self._low_water = 1
        self._over = False
        self._waiting = waiting
        self._watching: Registration | None = None
        self._look()  # it is mostly there already
        if not self._over:
            waiting.add(self)
            engine.timers.watch(self)
            self._watching = engine.watch(connection, self._look, on_failure)

    def stop(self) -> None:
        """Wait no longer; no callback follows."""
        if not self._over:
            self._over = True
            self._waiting.discard(self)
            if self._watching is not None:
                self._engine.timers.forget(self)
                self._watching.release()
                self._watching = None  # no reference cycle is left for the garbage collector

    def on_deadline(self) -> None:
        """The client is late."""
        self.refuse(None)

    def refuse(self, error: Exception | None) -> None:
        """Wait no longer, and call `on_refused`."""
        self.stop()
        self._on_refused(error)

    def _look(self) -> None:
        if self._over:
            return
        try:
            found = self._peek()
        except BlockingIOError:
            return
        except (RemoteProtocolError, OSError) as error:
            self.refuse(error)
            return
        except Exception as error:
            self.stop()
            report_failure(self._on_failure, error)
            return
        if found is not None:
            self.stop()
            try:
                self._set_low_water(1)
                self._on_found(found)
            except Exception as error:
                report_failure(self._on_failure, error)

    def _peek(self) -> Found | None:
        """What `parse` makes of the bytes that have arrived."""
        seen = self.connection.recv(MAX_PEEK_BYTES, socket.MSG_PEEK)
        found = self._parse(seen)
        if found is None and peer_ended(self.connection):
            raise RemoteProtocolError("the connection ended before its first bytes were complete")
        if found is None:
            self._set_low_water(len(seen) + 1)
        return found

    def _set_low_water(self, count: int) -> None:
        if count != self._low_water:
            self._low_water = count
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
