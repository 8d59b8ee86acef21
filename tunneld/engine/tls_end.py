"""A connection in TLS as a duct: the relay of one visitor, served inside the pump, without a task.

    epoll ──► on_event ──► decrypt  ──► the user, at once          read no further while anything is held
    the user ──► put ──► encipher ──► one write after the batch    no room until the kernel has all of it

So a stopped direction holds one buffer, as between plain sockets. An end is TLS's goodbye and then TCP's; a connection
that ends without one is broken, and a reset is a reset.

Our own goodbye may still have to wait for the peer to read, when the relay and its user are done. Then nobody is left
but this, and it waits no longer than `linger`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from tunneld.engine.end import End, log
from tunneld.engine.engine import Limiter, Relay, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.pump import Pump
from tunneld.engine.socket_flow import BROKEN, INEXACT, READABLE, WRITABLE
from tunneld.tls.connection import TlsSocket

LINGER = 60.0
"""Seconds for the peer to take our goodbye, where no relay has said it."""


class TlsEnd(End):
    """A `TlsSocket` after its handshake, which it owns. It is the pump's handler from `start` on."""

    __slots__ = (
        "_blocked",
        "_exact",
        "_fd",
        "_parted",
        "_paused",
        "_pump",
        "_stopped",
        "_tls",
        "_touched",
        "deadline",
        "linger",
    )

    def __init__(self, pump: Pump, tls: TlsSocket) -> None:
        super().__init__()
        self.deadline = 0.0
        self.linger = LINGER
        self._pump = pump
        self._tls = tls
        self._fd = tls.connection.fileno()
        self._exact = False  # the end may stand behind the last octets: read until EAGAIN
        self._blocked = False  # the kernel takes nothing now
        self._paused = False  # the user waits for room
        self._stopped = False  # it is not read while something is held
        self._parted = False  # our end is sent
        self._touched = False  # a flush comes after the batch

    def start(self) -> None:
        """Begin to serve; what OpenSSL has already is held. Raises OSError where the connection is broken."""
        with memoryview(self._pump.wide_buffer) as plain:
            octets = self._tls.decrypt(plain)
            self.buffered += plain[:octets]
        self.eof_received = self._tls.ended
        self._stopped = bool(self.buffered)
        self._pump.attach(self._fd, self)
        self._touch()

    @property
    def pump(self) -> Pump:
        """See `End.pump`."""
        return self._pump

    @property
    def quantum(self) -> int:
        """That of any flow."""
        return self._pump.quantum

    # What its user does

    def send_capacity(self) -> int:
        """See `End.room`: a buffer, once the kernel has taken the one before."""
        if self.closed or self.eof_sent:
            return 0
        if self._touched:
            self._flush()
        if self._blocked or self.closed:
            self._paused = True
            return 0
        return self._pump.buffer_size

    def write(self, data: memoryview) -> None:
        """See `End.put`."""
        self._tls.write(data)
        self._touch()

    def send(self, data: bytes) -> None:
        """See `End.send`. Raises OSError."""
        self.write(memoryview(data))

    def consume(self, octets: int) -> None:
        """See `End.take`. Where all is taken, epoll tells what stands in the connection."""
        super().consume(octets)
        if self._stopped and not self.buffered and not self.closed:
            self._stopped = False
            self._pump.rearm(self._fd)
        self._end_if_done()

    def deliver_buffered(self) -> None:
        """See `End.offer`."""
        super().deliver_buffered()
        self.consume(0)

    def finish(self) -> None:
        """See `End.finish`."""
        if self.eof_sent or self.closed:
            return
        self.eof_sent = True
        self._tls.finish()
        self._touch()
        self._end_if_done()

    def reset(self, reason: str) -> None:
        """See `End.reset`; TLS has no words for it."""
        if not self.closed:
            self._discard()
            reset_on_close(self._tls.connection)
            self._leave()

    def close(self) -> None:
        """Let go of it with a goodbye, as far as the kernel takes one now."""
        if not self.closed:
            self._tls.finish()
            self._tls.flush_if_possible()
            self._discard()
            self._leave()

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
        """Something happened on the connection."""
        if self._blocked and events & WRITABLE:
            self._blocked = False
            self._flush()
        if events & INEXACT:
            self._exact = True
        if events & READABLE and not self.eof_received and not self.closed:
            if self.buffered:
                self._stopped = True
            else:
                self._read()
        if events & BROKEN and (self.buffered or self.eof_received) and not self.closed:
            self._look_for_error()

    def on_failure(self, error: Exception) -> None:
        """A bug of ours: it costs this connection, nothing else."""
        log.error("tls connection failed", exc_info=error)
        self._break(ConnectionAbortedError("internal error"))

    def on_stop(self) -> None:
        """The pump stops."""
        self.reset("the relay stopped")

    def on_deadline(self) -> None:
        """The peer has not taken our goodbye for `linger` seconds."""
        self._break(TimeoutError("it took nothing more"))

    # Inside

    def _consumed(self, octets: int) -> None:
        """Nobody is given credit."""

    def _read(self) -> None:
        """Read until the connection is drained, the user takes no more, or this turn's share is used up."""
        pump, tls = self._pump, self._tls
        share = pump.quantum
        try:
            with memoryview(pump.wide_buffer) as plain:
                while share > 0:
                    read, count = tls.receive_into(pump.view, plain)
                    if count:
                        self.feed(plain[:count])
                    if self.buffered:
                        self._stopped = True
                    if self.buffered or tls.ended or self.closed or (read < pump.buffer_size and not self._exact):
                        break
                    share -= read
                else:
                    pump.rearm(self._fd)
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)
        if self.closed:
            return
        if tls.ended:
            self.feed_eof()
            self._end_if_done()
        if tls.pending_output:
            self._touch()

    def _touch(self) -> None:
        """Something was said: send it after the batch."""
        if not self._touched and not self._blocked:
            self._touched = True
            self._pump.call_after_batch(self._flush)

    def _flush(self) -> None:
        self._touched = False
        if self.closed or self._blocked:
            return
        try:
            self._blocked = not self._tls.flush()
            if self.eof_sent and not self._blocked and not self._parted:
                self._parted = True
                self._tls.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._break(error)
            return
        if self.eof_sent:
            self._end_if_done()
        if self._paused and not self._blocked and not self.closed:
            self._paused = False
            self.notify_writable()

    def _end_if_done(self) -> None:
        """Both have said goodbye and ours is sent: nothing is left but what the user has yet to take."""
        if not (self.eof_sent and self.eof_received) or self.closed:
            return
        if self._tls.pending_output:
            self.deadline = self._pump.now() + self.linger
            self._pump.timers.watch(self)
        elif not self.buffered:
            self._discard()
            self._leave()

    def _leave(self) -> None:
        self._pump.timers.forget(self)
        if self._pump.handlers.get(self._fd) is self:
            del self._pump.handlers[self._fd]
        self._tls.close()

    def _break(self, error: OSError) -> None:
        """The connection is broken: the user hears of it."""
        if self.closed:
            return
        reset_on_close(self._tls.connection)
        self._leave()
        self._notify_broken(error)

    def _look_for_error(self) -> None:
        """Ask the kernel whether the connection is broken, without reading from it."""
        number = self._tls.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._break(OSError(number, os.strerror(number)))
