"""A TLS connection as an end: the connection of one visitor, served in the pump, without a task.

    epoll ──► on_event ──► decrypt ──► the handler, at once         nothing more is read while bytes are buffered
    handler ──► write ──► encrypt ──► one send after the batch      no capacity until the kernel has taken all of it

So a stopped direction holds one buffer, as between plain sockets. An end of file is TLS's close_notify followed by
TCP's FIN. A connection that ends without close_notify is broken (RFC 8446 §6.1), and a reset is a reset.

When the relay is finished, our close_notify may still have to wait for the peer to read. Then only this object is left,
and it waits no longer than `linger` seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from tunneld.engine.end import End, log
from tunneld.engine.engine import Limiter, Relay, RelayEnd, Side
from tunneld.engine.failures import reset_on_close, unacknowledged
from tunneld.engine.pump import Pump
from tunneld.engine.relay import DELIVERY_CHECK
from tunneld.engine.socket_flow import BROKEN, READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.net.sockets import pending_error
from tunneld.tls.connection import TlsSocket

DEFAULT_LINGER = 60.0
"""Seconds for the peer to read our close_notify, if no relay has set `linger`."""


class TlsEnd(End):
    """A `TlsSocket` after its handshake, which it owns. It is the pump's handler from `start` on."""

    __slots__ = (
        "_blocked",
        "_fd",
        "_flush_scheduled",
        "_give_up",
        "_handler_waits",
        "_pump",
        "_reading_stopped",
        "_resetting",
        "_shutdown_sent",
        "_tls",
        "_until_eagain",
        "_write_error",
        "deadline",
        "linger",
    )  # fmt: skip

    def __init__(self, pump: Pump, tls: TlsSocket) -> None:
        super().__init__()
        self.deadline = 0.0
        self.linger = DEFAULT_LINGER
        self._pump = pump
        self._tls = tls
        self._fd = tls.connection.fileno()
        self._until_eagain = False  # a short read does not mean that the socket is drained, see `socket_flow`
        self._blocked = False  # the kernel takes no more bytes now
        self._handler_waits = False  # `send_capacity` was 0: `on_writable` is due
        self._reading_stopped = False  # until the buffered bytes are consumed
        self._shutdown_sent = False  # close_notify and FIN are on their way
        self._flush_scheduled = False
        self._resetting = False  # closed, but for bytes that the peer has not acknowledged
        self._write_error: OSError | None = None  # the peer takes no more; what it has sent is still read
        self._give_up = 0.0  # Trio time at which it is closed all the same

    def start(self) -> None:
        """Attach to the pump, and buffer bytes that OpenSSL has. Raises OSError if the connection is broken."""
        with memoryview(self._pump.wide_buffer) as plain:
            count = self._tls.decrypt(plain)
            self.buffered += plain[:count]
        self.eof_received = self._tls.ended
        self._reading_stopped = bool(self.buffered)
        self._pump.attach(self._fd, self)
        self._schedule_flush()

    @property
    def pump(self) -> Pump:
        """See `End.pump`."""
        return self._pump

    @property
    def quantum(self) -> int:
        """See `End.quantum`: that of the current batch."""
        return self._pump.quantum

    # Called by the handler

    def send_capacity(self) -> int:
        """See `End.send_capacity`: one buffer, once the kernel has taken the one before."""
        if self.closed or self.eof_sent:
            return 0
        if self._flush_scheduled:
            self._flush()
        if self._blocked or self.closed or self._write_error is not None:
            self._handler_waits = True
            return 0
        return self._pump.buffer_size

    def write(self, data: memoryview) -> None:
        """See `End.write`."""
        self._tls.write(data)
        self._schedule_flush()

    def send(self, data: bytes) -> None:
        """See `End.send`. Raises OSError."""
        self.write(memoryview(data))

    def consume(self, count: int) -> None:
        """See `End.consume`. Once the buffer is empty, epoll reports what is pending in the connection."""
        super().consume(count)
        if self._reading_stopped and not self.buffered and not self.closed:
            self._reading_stopped = False
            self._pump.rearm(self._fd)
        self._close_if_finished()

    def deliver_buffered(self) -> None:
        """See `End.deliver_buffered`."""
        super().deliver_buffered()
        self.consume(0)

    def finish(self) -> None:
        """See `End.finish`."""
        if self.eof_sent or self.closed:
            return
        self.eof_sent = True
        self._tls.finish()
        self._schedule_flush()
        self._close_if_finished()

    def reset(self, reason: str) -> None:
        """See `End.reset`. TLS cannot tell the peer the reason."""
        if not self.closed:
            self._discard()
            reset_on_close(self._tls.connection)
            self._close_socket()

    def reset_after_delivery(self, reason: str) -> None:
        """See `End.reset_after_delivery`. Waits for acknowledgements no longer than `linger` seconds."""
        if self.closed:
            return
        self._discard()
        self._resetting = True
        self._give_up = self._pump.now() + self.linger
        self._reset_if_delivered()

    def _reset_if_delivered(self) -> None:
        tls, now = self._tls, self._pump.now()
        try:
            tls.flush()
        except OSError:
            self._give_up = now
        if now < self._give_up and (tls.pending_output or unacknowledged(tls.connection)):
            self.deadline = now + DELIVERY_CHECK
            self._pump.timers.watch(self)
        else:
            self._resetting = False
            reset_on_close(tls.connection)
            self._close_socket()

    def close(self) -> None:
        """Close an end that is not needed, with as much of a close_notify as the kernel takes now."""
        if not self.closed:
            self._tls.finish()
            self._tls.flush_if_possible()
            self._discard()
            self._close_socket()

    def join(
        self,
        connection: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        side: Side = Side.VISITOR,
        throttle: Limiter | None = None,
    ) -> Relay:
        """See `End.join`."""
        self.linger = linger
        return super().join(connection, linger=linger, on_end=on_end, side=side, throttle=throttle)

    # The pump's handler

    def on_event(self, events: int) -> None:
        """An event of the connection."""
        if self._blocked and events & WRITABLE:
            self._blocked = False
            self._flush()
        if events & UNTIL_EAGAIN:
            self._until_eagain = True
        if events & READABLE and not self.eof_received and not self.closed:
            if self.buffered:
                self._reading_stopped = True
            else:
                self._read()
        if events & BROKEN and (self.buffered or self.eof_received) and not self.closed:
            self._check_error()

    def on_failure(self, error: Exception) -> None:
        """A bug: close this connection and nothing else."""
        log.error("tls connection failed: internal error", exc_info=error)
        self._fail_connection(ConnectionAbortedError("internal error"))

    def on_stop(self) -> None:
        """The pump stops."""
        self.reset("the relay stopped")
        if self._resetting:
            self._give_up = 0.0
            self._reset_if_delivered()

    def on_deadline(self) -> None:
        """The peer has not read our close_notify for `linger` seconds, or it is time to look for acknowledgements."""
        if self._resetting:
            self._reset_if_delivered()
            return
        self._fail_connection(TimeoutError("the peer stopped reading"))

    # Internal

    def _consumed(self, count: int) -> None:
        """TCP's own window is the flow control; no credit is granted."""

    def _read(self) -> None:
        """Read until the connection is drained, the handler takes no more, or the quantum is used up."""
        pump, tls = self._pump, self._tls
        share = pump.quantum
        try:
            with memoryview(pump.wide_buffer) as plain:
                while share > 0:
                    read, count = tls.receive_into(pump.view, plain)
                    if count:
                        self.feed(plain[:count])
                    if self.buffered:
                        self._reading_stopped = True
                    if (
                        self.buffered
                        or tls.ended
                        or self.closed
                        or (read < pump.buffer_size and not self._until_eagain)
                    ):
                        break
                    share -= read
                else:
                    pump.rearm(self._fd)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail_connection(self._write_error or error)
        if self.closed:
            return
        if tls.ended:
            self.feed_eof()
            self._close_if_finished()
        if tls.pending_output:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        """Send what was written after the current batch of events."""
        if not self._flush_scheduled and not self._blocked:
            self._flush_scheduled = True
            self._pump.call_after_batch(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.closed or self._blocked or self._write_error is not None:
            return
        try:
            self._blocked = not self._tls.flush()
            if self.eof_sent and not self._blocked and not self._shutdown_sent:
                self._shutdown_sent = True
                self._tls.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail_write(error)
            return
        if self.eof_sent:
            self._close_if_finished()
        if self._handler_waits and not self._blocked and not self.closed:
            self._handler_waits = False
            self.notify_writable()

    def _close_if_finished(self) -> None:
        """Close the socket once both directions have ended, our close_notify is sent and the buffer is consumed."""
        if self._write_error is not None and self.eof_received and not self.buffered:
            self._fail_connection(self._write_error)
            return
        if not (self.eof_sent and self.eof_received) or self.closed:
            return
        if self._tls.pending_output:
            self.deadline = self._pump.now() + self.linger
            self._pump.timers.watch(self)
        elif not self.buffered:
            self._discard()
            self._close_socket()

    def _close_socket(self) -> None:
        self._pump.timers.forget(self)
        self._pump.remove(self._fd, self)
        self._tls.close()

    def _fail_write(self, error: OSError) -> None:
        """The peer takes no more bytes. Read what it has sent before the connection fails, see `relay`."""
        if self._write_error is not None or self.eof_received:
            self._fail_connection(error)
            return
        self._write_error = error
        self._until_eagain = True
        self._pump.rearm(self._fd)

    def _fail_connection(self, error: OSError) -> None:
        """The connection is broken: close it and notify the handler."""
        if self.closed:
            return
        reset_on_close(self._tls.connection)
        self._close_socket()
        self._notify_broken(error)

    def _check_error(self) -> None:
        """Close the connection if it is broken, once the bytes that the peer has sent are consumed."""
        error = pending_error(self._tls.connection)
        if error is not None and self.eof_received:
            self._fail_connection(error)
        elif error is not None:
            self._fail_write(error)
