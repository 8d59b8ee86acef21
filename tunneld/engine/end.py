"""An end: one byte stream in the pump that is no plain socket, such as a channel of a carrier or a TLS connection.

Received bytes go straight to the end's handler. What the handler does not take at once is kept in `buffered`. To send,
the handler asks `send_capacity` how many bytes `write` accepts now; after 0, `on_writable` is called once that changes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Protocol

import structlog

from tunneld.engine.end_relay import EndRelay
from tunneld.engine.engine import Limiter, Relay, RelayEnd, Side
from tunneld.engine.pump import Pump

log = structlog.get_logger("engine")


class EndHandler(Protocol):
    """The consumer of an end. If a method raises, the end is reset and `on_internal_error` is called."""

    def on_data(self, data: memoryview) -> int:
        """Bytes arrived while `buffered` was empty; return how many are taken. `data` is valid only during the call."""

    def on_writable(self) -> None:
        """`send_capacity` may be more than 0 again."""

    def on_eof(self) -> None:
        """The peer sends no more, and `buffered` is empty."""

    def on_reset(self, error: OSError) -> None:
        """The end is gone; undelivered bytes are lost."""

    def on_internal_error(self, error: Exception) -> None:
        """A method of this handler raised: a bug. The end has been reset."""


class End:
    """The part that all kinds of ends share; a subclass implements the methods of the first group."""

    __slots__ = ("buffered", "closed", "eof_received", "eof_sent", "handler")

    def __init__(self) -> None:
        self.buffered = bytearray()  # received and not taken by the handler
        self.eof_received = False
        self.eof_sent = False
        self.closed = False  # both directions are over
        self.handler: EndHandler = NO_HANDLER

    # Implemented by each kind of end

    @property
    def pump(self) -> Pump:
        """The pump that serves this end."""
        raise NotImplementedError

    @property
    def quantum(self) -> int:
        """Bytes that a handler may write before other handlers are served."""
        raise NotImplementedError

    def send_capacity(self) -> int:
        """Bytes that `write` accepts now. After 0, `on_writable` is called once there is space, or the end closes."""
        raise NotImplementedError

    def write(self, data: memoryview) -> None:
        """Send `data`, at most `send_capacity` bytes. The caller may reuse its memory afterwards."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Send a header of our own before the handler's data. It must be small: it is queued without regard to
        `send_capacity`.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Send an end of file; the other direction goes on."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """End both directions now, and tell the peer the reason if the protocol can. Does nothing on a closed end."""
        raise NotImplementedError

    def reset_after_delivery(self, reason: str) -> None:
        """Reset behind the bytes that were written. In a carrier these are in front of the reset anyway."""
        self.reset(reason)

    def _consumed(self, count: int) -> None:
        """The handler has taken `count` bytes; they are not in `buffered`. A carrier grants credit for them."""
        raise NotImplementedError

    # Called by the handler

    def consume(self, count: int) -> None:
        """Take the first `count` bytes out of `buffered`. Calls `on_eof` if they were the last."""
        del self.buffered[:count]
        if not self.closed:
            self._consumed(count)
        if self.eof_received and not self.buffered and not self.closed:
            self._call(self.handler.on_eof)

    def deliver_buffered(self) -> None:
        """Offer the buffered bytes, and an end of file behind them, to a handler that has just been set."""
        data, self.buffered = self.buffered, bytearray()
        if data:
            self.feed(memoryview(data))
        if self.eof_received and not self.buffered and not self.closed:
            self._call(self.handler.on_eof)

    def unread(self, data: bytes) -> None:
        """Put `data` back in front of `buffered`. It is not counted against the window, so keep it to a header."""
        self.buffered[:0] = data

    def detach_handler(self) -> None:
        """Remove the handler of a finished end. Breaks the reference cycle, so no garbage collection is needed."""
        self.handler = NO_HANDLER

    def close(self) -> None:
        """Close an end that is not needed."""
        self.reset("not needed")

    def join(
        self,
        connection: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        side: Side = Side.VISITOR,
        throttle: Limiter | None = None,
    ) -> Relay:
        """Relay between this end and a socket, which is the given side of the relay. See `Engine.join`."""
        return EndRelay(self, connection, side, linger, on_end, throttle).start()

    # Called by the carrier or the connection below

    def feed(self, data: memoryview) -> None:
        """Deliver bytes of the peer to the handler, and buffer what it does not take."""
        size = len(data)
        taken = self._deliver(data, size) if size and not self.buffered else 0
        if self.closed:
            return
        if taken < size:
            self.buffered += data[taken:]
        if taken:
            self._consumed(taken)

    def feed_eof(self) -> None:
        """The peer sends no more."""
        self.eof_received = True
        if not self.buffered:
            self._call(self.handler.on_eof)

    def notify_writable(self) -> None:
        """There is space to send again."""
        self._call(self.handler.on_writable)

    def notify_reset(self, reason: str) -> None:
        """The peer reset this end, or the carrier is lost."""
        self._notify_broken(ConnectionResetError(errno.ECONNRESET, reason))

    # Internal

    def _notify_broken(self, error: OSError) -> None:
        handler, buffered = self.handler, self.buffered
        self._discard()
        if handler is not NO_HANDLER:
            self.buffered = buffered  # it came before the failure: the handler may still consume it
        try:
            handler.on_reset(error)
        except Exception as bug:
            handler.on_internal_error(bug)

    def _deliver(self, data: memoryview, size: int) -> int:
        """Return how many bytes are taken. If the handler sets another one meanwhile, that one is offered the rest."""
        taken, handler = 0, self.handler
        try:
            taken = handler.on_data(data)
            while handler is not self.handler and taken < size and not self.closed and not self.buffered:
                handler = self.handler
                taken += handler.on_data(data[taken:])
        except Exception as error:
            self._fail(error)
        return taken

    def _discard(self) -> None:
        """Both directions are over: drop the buffer and the handler."""
        self.closed = True
        self.handler = NO_HANDLER
        self.buffered = bytearray()

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        handler = self.handler
        self.reset("internal error")
        handler.on_internal_error(error)


class _NoHandler:
    """The handler of an end that has none yet, or none any more: everything is buffered."""

    def on_data(self, _data: memoryview) -> int:
        return 0

    def on_writable(self) -> None:
        pass

    def on_eof(self) -> None:
        pass

    def on_reset(self, error: OSError) -> None:
        pass

    def on_internal_error(self, error: Exception) -> None:
        log.error("connection failed: internal error", exc_info=error)


NO_HANDLER = _NoHandler()
