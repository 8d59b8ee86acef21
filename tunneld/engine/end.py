"""An end: one side of a relay. Whatever has these methods can be joined to any other end.

    SocketEnd     a plain socket                       socket_end
    TlsEnd        a TLS connection                     tls_end
    StreamEnd     any Trio stream                      stream_end
    Channel       one byte stream of a carrier         tunneld.mux.channel

`End` is what a relay needs to end a side: `finish`, `reset`, `close`, `release`, and what its peer has not acknowledged
yet. How bytes are moved depends on the kinds of both ends, see `flow`. A plain socket is read by its flow, from the
kernel. Every other kind is a `BufferedEnd`:

Received bytes go straight to its handler. What the handler does not take at once is kept in `buffered`. To send, the
handler asks `send_capacity` how many bytes `write` accepts now; after 0, `on_writable` is called once that changes.

An end may fail in one direction first. If a write fails, what the peer has sent before may still be there to read: the
handler's `on_write_failed` is called, and later `on_eof` or `on_reset`, as far as the bytes have come.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from tunneld.engine.failures import TcpSocket
from tunneld.engine.scheduler import Scheduler
from tunneld.log import Logger

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe

log = Logger("engine")

DEFAULT_LINGER: Final = 60.0
"""Seconds for the peer to read what was written to a released end, if no relay has set `linger`."""


class End:
    """One side of a relay."""

    __slots__ = ()

    def finish(self) -> None:
        """Send an end of file; the other direction goes on. Raises OSError if the peer takes no more."""
        raise NotImplementedError

    def finish_when_connected(self) -> bool:
        """The same for an end to which nothing was written. False: it is still connecting, try again once it is
        writable.
        """
        self.finish()
        return True

    def reset(self, reason: str) -> None:
        """End both directions now, and tell the peer the reason if the protocol can. Does nothing on a closed end."""
        raise NotImplementedError

    def close(self, reason: str = "not needed") -> None:
        """End both directions of an end that is not needed, or to whose peer everything was sent. This is no reset if
        the protocol can do without.
        """
        self.reset(reason)

    def release(self) -> None:
        """Both directions are finished, but for our end of file perhaps: send that. The end closes by itself."""
        raise NotImplementedError

    def unacknowledged(self) -> int:
        """Bytes written and not acknowledged by the peer, which a reset would discard. 0 where that is not known."""
        return 0

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """The connection that carries this end and nothing else, if there is one: its peer may vanish, see
        `vanished`.
        """
        return None


class EndHandler(Protocol):
    """The consumer of an end. If a method raises, the end is reset and `on_internal_error` is called."""

    def on_data(self, data: memoryview) -> int:
        """Bytes arrived while `buffered` was empty; return how many are taken. `data` is valid only during the call."""

    def on_writable(self) -> None:
        """`send_capacity` may be more than 0 again."""

    def on_eof(self) -> None:
        """The peer sends no more, and `buffered` is empty."""

    def on_write_failed(self, error: OSError) -> None:
        """The peer takes no more bytes. What it has sent is still delivered."""

    def on_reset(self, error: OSError) -> None:
        """The end is gone; undelivered bytes are lost."""

    def on_internal_error(self, error: Exception) -> None:
        """A method of this handler raised: a bug. The end has been reset."""


class PipeTaker(Protocol):
    """Takes bulk data of an end that is above a plain socket in place of its handler, without a copy in this process. A
    pipe has bytes in front of all that the handler gets later.
    """

    def pipe_capacity(self) -> int:
        """Bytes that `take_pipe` accepts now; 0: they go to the handler."""

    def take_pipe(self, pipe: Pipe, /) -> bool:
        """Own a borrowed pipe with bytes of the end. False: some of them wait, and `BufferedEnd.read_on` is called once
        they are delivered; until then the end takes no more from its peer.
        """


class BufferedEnd(End):
    """An end with a handler: the part that all kinds but sockets share. A subclass implements the first group."""

    __slots__ = (
        "buffered", "closed", "engine", "eof_received", "eof_sent", "handler", "linger", "pipe_taker", "quantum",
        "write_failure",
    )  # fmt: skip

    def __init__(self, engine: Scheduler) -> None:
        self.engine = engine
        self.buffered = bytearray()  # received and not taken by the handler
        self.quantum = engine.max_quantum  # bytes that a handler may write before other handlers are served
        self.eof_received = False
        self.eof_sent = False
        self.closed = False  # both directions are over
        self.write_failure: OSError | None = None  # the peer takes no more bytes
        self.linger = DEFAULT_LINGER  # seconds that a released end may take to deliver what was written
        self.handler: EndHandler = NO_HANDLER
        self.pipe_taker: PipeTaker | None = None

    # Implemented by each kind of end

    def send_capacity(self) -> int:
        """Bytes that `write` accepts now. After 0, `on_writable` is called once there is space, or the end closes."""
        raise NotImplementedError

    def write(self, data: memoryview) -> None:
        """Send `data`, at most `send_capacity` bytes. The caller may reuse its memory afterwards."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Send a header of our own before the handler's data. It must be small: it is queued without regard to
        `send_capacity`. Raises OSError if the end is gone.
        """
        raise NotImplementedError

    def _consumed(self, count: int) -> None:
        """The handler has taken `count` bytes; they are not in `buffered`. A carrier grants credit for them."""
        raise NotImplementedError

    # Implemented where the end is above a plain socket of its own, see also `pipe_taker`

    def pipe_capacity(self) -> int:
        """Bytes that `write_pipe` accepts now, once `send_capacity` is not 0; 0: it accepts none."""
        return 0

    def write_pipe(self, pipe: Pipe) -> None:
        """Send bytes out of the pipe, which stays the caller's. If some are left, `on_writable` is called once there is
        space for them, or the end fails.
        """
        raise NotImplementedError

    def read_on(self) -> None:
        """See `PipeTaker.take_pipe`."""

    # Called by the handler

    def release(self) -> None:
        """See `End.release`. Removing the handler breaks a reference cycle: no garbage collection is needed."""
        self.handler = NO_HANDLER
        self.finish()

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

    # Called by the carrier or the connection below

    def feed(self, data: memoryview) -> None:
        """Deliver bytes of the peer to the handler, and buffer what it does not take."""
        size, taken = len(data), 0
        if size and not self.buffered:
            handler = self.handler
            try:
                taken = handler.on_data(data)
                if handler is not self.handler:
                    taken = self._deliver_to_next(handler, data, taken)
            except Exception as error:
                self._fail(error)
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

    def notify_write_failed(self, error: OSError) -> None:
        """The peer takes no more bytes."""
        self.write_failure = error
        handler = self.handler
        try:
            handler.on_write_failed(error)
        except Exception as bug:
            self._fail(bug)

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

    def _deliver_to_next(self, handler: EndHandler, data: memoryview, taken: int) -> int:
        """`handler` has set another handler: offer that one the rest. Return how many bytes are taken in all."""
        while handler is not self.handler and taken < len(data) and not self.closed and not self.buffered:
            handler = self.handler
            taken += handler.on_data(data[taken:])
        return taken

    def _discard(self) -> None:
        """Both directions are over: drop the buffer and the handler."""
        self.closed = True
        self.handler = NO_HANDLER
        self.pipe_taker = None
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

    def on_write_failed(self, error: OSError) -> None:
        pass

    def on_reset(self, error: OSError) -> None:
        pass

    def on_internal_error(self, error: Exception) -> None:
        log.error("connection failed: internal error", exc_info=error)


NO_HANDLER: Final = _NoHandler()
