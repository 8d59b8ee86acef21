"""One TLS handshake with a visitor, in the pump and without a task.

    start ──► read what is there ──► OpenSSL ──► send ──► an event ──► ... ──► on_done
                                        ▲ at most a share of each turn

A handshake takes OpenSSL up to a millisecond, most of it for one signature. All of them share a part of each turn of
the pump (`CostShare`): a flood of them delays further handshakes, and nothing else.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from tunneld.engine.budget import CostShare
from tunneld.engine.events import READABLE, WRITABLE
from tunneld.engine.pump import Pump
from tunneld.tls.connection import READ_SIZE, TlsSocket

HELLO_COST, FINISHED_COST = 90, 15
"""Units of `EngineLimits.turn_cost` for the first message of a client, whose answer is signed, and for each later one:
some 600 and 100 µs.
"""


class TlsAccept:
    """One handshake; it owns the connection until one of the callbacks is called. A handler of the pump."""

    __slots__ = (
        "_cost", "_deferred", "_engine", "_fd", "_on_done", "_on_failed", "_over", "_running", "_share", "_tls",
        "deadline",
    )  # fmt: skip

    def __init__(
        self,
        engine: Pump,
        connection: socket.socket,
        context: ssl.SSLContext,
        deadline: float,
        on_done: Callable[[TlsSocket], None],
        on_failed: Callable[[Exception], None],
        share: CostShare,
        running: set[TlsAccept],
    ) -> None:
        """`running` holds the handshake until it is over. Call `start`.

        Args:
            engine: reports events and the deadline, and does nothing else with the connection afterwards.
            connection: accepted, and unread.
            context: has the certificate.
            deadline: when it fails with a `TimeoutError` (Trio's clock).
            on_done: gets the connection, from which bytes of the visitor may have been read already.
            on_failed: called instead, once the connection is closed: with an `OSError`, or with a bug.
            share: the part of each turn of the pump for handshakes.
            running: the handshakes that are not over.
        """
        self.deadline = deadline
        self._engine = engine
        self._fd = connection.fileno()
        self._tls = TlsSocket(connection, context, server_side=True)
        self._on_done = on_done
        self._on_failed = on_failed
        self._share = share
        self._running = running
        self._cost = HELLO_COST  # of the next step
        self._deferred = False  # `on_turn` comes
        self._over = False
        running.add(self)

    def start(self) -> None:
        """Begin with what the client has sent. One of the callbacks follows, perhaps at once."""
        self._engine.timers.watch(self)
        try:
            self._engine.attach(self._fd, self)
        except OSError as error:
            self._fail(error)
        else:
            self._go_on()

    def stop(self, reason: str) -> None:
        """Give up."""
        self._fail(ConnectionAbortedError(reason))

    # The handler of the pump

    def on_event(self, events: int) -> None:
        """The client has sent something, or takes more."""
        if events & WRITABLE and self._tls.pending_output:
            self._flush()
        if events & READABLE:
            self._go_on()

    def on_turn(self) -> None:
        """See `DeferredHandler`."""
        self._deferred = False
        self._go_on()

    def on_failure(self, error: Exception) -> None:
        """A bug."""
        self._fail(error)

    def on_stop(self) -> None:
        """The pump stops."""
        self.stop("the relay stopped")

    def on_deadline(self) -> None:
        """The client is late."""
        self._fail(TimeoutError("the TLS handshake took too long (names.head_timeout)"))

    def _go_on(self) -> None:
        """Read, do the next step, and send; or wait for a later turn, if the steps of this turn have taken long."""
        if self._over or self._deferred:
            return
        if self._share.left <= 0:
            self._deferred = True
            self._engine.budget.defer(self._share, self)
            return
        tls = self._tls
        try:
            data = tls.connection.recv(READ_SIZE)
            self._share.use(self._cost)
            self._cost = FINISHED_COST
            tls.feed(data)
            is_done = tls.advance_handshake()
            if not is_done:
                tls.flush()
        except BlockingIOError:
            return
        except OSError as error:
            tls.flush_if_possible()  # OpenSSL has an alert for the client
            self._fail(error)
            return
        if is_done:
            self._finish()
        elif len(data) == READ_SIZE:  # there may be more, which epoll has reported
            self._engine.rearm(self._fd)

    def _flush(self) -> None:
        try:
            self._tls.flush()
        except OSError as error:
            self._fail(error)

    def _finish(self) -> None:
        self._end()
        try:
            self._on_done(self._tls)
        except Exception as error:
            self._tls.close()
            self._on_failed(error)

    def _fail(self, error: Exception) -> None:
        if not self._over:
            self._end()
            self._tls.close()
            self._on_failed(error)

    def _end(self) -> None:
        self._over = True
        self._running.discard(self)
        self._engine.timers.forget(self)
        self._engine.detach(self._fd, self)
