"""A TLS connection as an end: the connection of one visitor, served in the pump, without a task.

    epoll ──► on_event ──► decrypt ──► the handler, at once         nothing more is read while bytes are buffered
    handler ──► write ──► encrypt ──► one send after the batch      no capacity until the kernel has taken all of it

So a stopped direction holds one buffer, as between plain sockets. A plain connection with this interface
(`plain_transport`) also moves bulk data as these do: it takes bytes out of a pipe (`write_pipe`), and gives them to
`pipe_taker` in one, if that is set. An end of file is TLS's close_notify followed by
TCP's FIN. A connection that ends without close_notify is broken (RFC 8446 §6.1), and a reset is a reset.

Where both machines have agreed on it (`may_leave`), what is encrypted already goes on without this TLS. Each direction
leaves behind its own close_notify, and ends with TCP's FIN alone: what is inside has an end of its own.

When the relay is finished, our close_notify may still have to wait for the peer to read. Then only this object is left,
and it waits no longer than `linger` seconds.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from tunneld.engine.end import BufferedEnd, PipeTaker, log
from tunneld.engine.events import BROKEN, READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.failures import TcpSocket, reset_on_close, unacknowledged
from tunneld.engine.limits import UNLIMITED
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.net.sockets import pending_error
from tunneld.tls.connection import TlsSocket

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe

ROOM_FOR_RECORDS: Final = 4096
"""Bytes beyond a buffer: a buffer in records of another TLS, with the headers of frames, leaves in one piece."""


class TlsEnd(BufferedEnd):
    """A `TlsSocket` after its handshake, which it owns. It is the pump's handler from `start` on."""

    __slots__ = (
        "_blocked", "_fd", "_flush_scheduled", "_handler_waits", "_pump", "_reading_stopped", "_shutdown_sent",
        "_splicing", "_tls", "_until_eagain", "deadline", "may_leave",
    )  # fmt: skip

    def __init__(self, pump: Pump, tls: TlsSocket | PlainTransport) -> None:
        super().__init__(pump)
        self.deadline = 0.0
        self.may_leave = False  # a close_notify of the peer means that it goes on without TLS
        self._pump = pump
        self._tls = tls
        self._fd = tls.connection.fileno()
        self._until_eagain = False  # a short read does not mean that the socket is drained, see `socket_flow`
        self._blocked = False  # the kernel takes no more bytes now
        self._handler_waits = False  # `send_capacity` was 0: `on_writable` is due
        self._reading_stopped = False  # until the buffered bytes are consumed
        self._shutdown_sent = False  # close_notify and FIN are on their way
        self._flush_scheduled = False
        self._splicing = False  # more bytes follow the ones that were read

    def start(self) -> None:
        """Attach to the pump, and buffer bytes that OpenSSL has. Raises OSError if the connection is broken."""
        with memoryview(self._pump.wide_buffer) as plain:
            count = self._tls.decrypt(plain)
            self.buffered += plain[:count]
        self.eof_received = self._tls.ended
        self._reading_stopped = bool(self.buffered)
        self._pump.attach(self._fd, self)
        self._schedule_flush()

    # Called by the handler

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`: about one buffer, once the kernel has taken the one before."""
        if self.closed or self.eof_sent:
            return 0
        if self._flush_scheduled:
            self._flush()
        if self._blocked or self.closed or self.write_failure is not None:
            self._handler_waits = True
            return 0
        return self._pump.buffer_size + ROOM_FOR_RECORDS

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        self._tls.write(data)
        if not self._flush_scheduled:
            self._schedule_flush()

    def send(self, data: bytes) -> None:
        """See `BufferedEnd.send`."""
        self._tls.write(data)
        if not self._flush_scheduled:
            self._schedule_flush()

    def pipe_capacity(self) -> int:
        """See `BufferedEnd.pipe_capacity`."""
        if not self._tls.takes_pipes or self._tls.pending_output:
            return 0
        return 0 if self._blocked or self.closed or self.eof_sent or self.write_failure is not None else UNLIMITED

    def write_pipe(self, pipe: Pipe) -> None:
        """See `BufferedEnd.write_pipe`."""
        try:
            while pipe.count:
                pipe.drain(self._fd)
        except BlockingIOError:
            self._blocked = self._handler_waits = True
        except OSError as error:
            self._fail_write(error)

    def read_on(self) -> None:
        """The `pipe_taker` takes bytes again: epoll reports what is pending in the connection."""
        if self._reading_stopped and not self.buffered and not self.closed:
            self._reading_stopped = False
            self._pump.rearm(self._fd)

    def consume(self, count: int) -> None:
        """See `BufferedEnd.consume`. Once the buffer is empty, epoll reports what is pending in the connection."""
        super().consume(count)
        self.read_on()
        self._close_if_finished()

    def deliver_buffered(self) -> None:
        """See `BufferedEnd.deliver_buffered`."""
        super().deliver_buffered()
        self.consume(0)

    def leave_tls(self) -> None:
        """Go on without TLS, and expect that of the peer. Does nothing on a plain connection, and when repeated."""
        tls = self._tls
        if isinstance(tls, TlsSocket) and not (tls.sends_clear or self.eof_sent or self.closed):
            self.may_leave = True
            tls.leave()
            self._schedule_flush()

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

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`."""
        if self.closed:
            return 0
        self._flush()
        return 0 if self.closed else self._tls.pending_output + unacknowledged(self._tls.connection)

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """See `End.tcp_connection`."""
        return None if self.closed else self._tls.connection

    def close(self, reason: str = "not needed") -> None:
        """See `End.close`. A peer that does not get all of it, with a close_notify, takes it for a reset."""
        if not self.closed:
            self._tls.finish()
            self._tls.flush_if_possible()
            self._discard()
            self._close_socket()

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
            elif not self._reading_stopped:
                self._read()
        if events & BROKEN and (self._reading_stopped or self.buffered or self.eof_received) and not self.closed:
            self._check_error()

    def on_failure(self, error: Exception) -> None:
        """A bug: close this connection and nothing else."""
        log.error("tls connection failed: internal error", exc_info=error)
        self._fail_connection(ConnectionAbortedError("internal error"))

    def on_stop(self) -> None:
        """The pump stops."""
        self.reset("the relay stopped")

    def on_deadline(self) -> None:
        """The peer has not read our close_notify for `linger` seconds."""
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
                    if self._splicing and self.pipe_taker is not None and (count := self._splice(self.pipe_taker)):
                        share -= count
                        if self._reading_stopped or self.closed:
                            break
                        continue
                    read, count = tls.receive_into(pump.view, plain)
                    self._splicing = read == pump.buffer_size and tls.takes_pipes
                    self._take(plain[:count])
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
            self._fail_connection(self.write_failure or error)
        if self.closed:
            return
        if tls.ended:
            self.feed_eof()
            self._close_if_finished()
        if tls.pending_output:
            self._schedule_flush()

    def _take(self, data: memoryview) -> None:
        """Deliver what was read, and look what it ended with."""
        if data:
            self.feed(data)
        if self._tls.ended and self.may_leave and not self.closed:
            self._follow()

    def _follow(self) -> None:
        """The peer has left TLS, unless it has ended: then an end of file follows, which is read as such."""
        tls = self._tls
        if isinstance(tls, TlsSocket) and not tls.receives_clear:
            rest = tls.follow()
            self.leave_tls()
            if rest:
                self.feed(memoryview(rest))

    def _splice(self, taker: PipeTaker) -> int:
        """Pass one pipe on; returns the number of bytes. 0: a plain read has to tell why there are none. Raises OSError
        if the connection is broken.
        """
        capacity = taker.pipe_capacity()
        pipe = self._pump.pipes.fill(self._fd, capacity) if capacity else None
        if pipe is None:
            self._splicing = False
            return 0
        count = pipe.count
        self._splicing = count >= self._pump.buffer_size
        self._reading_stopped = not taker.take_pipe(pipe)
        return count

    def _schedule_flush(self) -> None:
        """Send what was written after the current batch of events."""
        if not self._flush_scheduled and not self._blocked:
            self._flush_scheduled = True
            self._pump.call_after_batch(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.closed or self._blocked or self.write_failure is not None:
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
        """The peer takes no more bytes. What it has sent is still read."""
        if self.write_failure is not None or self.eof_received:
            self._fail_connection(error)
            return
        self._until_eagain = True
        self._pump.rearm(self._fd)
        self.notify_write_failed(error)

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
