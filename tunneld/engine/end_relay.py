"""A relay between an end (a channel of a carrier, or a TLS connection) and a socket, in the pump.

The socket is read only as far as the end has `send_capacity`, so a slow peer stops the sender behind the socket. What
the socket does not take stays in the end's buffer, which the window bounds, so a slow visitor stops the peer's sending
on this channel and delays no other channel. Both directions are resumed through epoll (`Pump.rearm`), behind other
ready sockets: nothing here calls into a carrier while it reads, and no relay can keep the pump to itself.

The relay ends as one between two sockets does (`socket_relay`). In addition, the socket is reset when the end is reset
or its carrier is lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from tunneld.engine.engine import Cause, Limiter, Relay, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.relay import PumpRelay
from tunneld.engine.socket_flow import BROKEN, READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.throttle import Allowance, Throttle
from tunneld.errors import reason_of
from tunneld.net.sockets import pending_error

if TYPE_CHECKING:
    from tunneld.engine.end import End

MIN_READ_COST = 2048
"""Bytes of the quantum that each read costs at least. If the peer asks for fragments of one byte, a short read costs as
much time as a long one.
"""


class EndRelay(PumpRelay):
    """An end joined to a socket: also the pump's handler for the socket, and the handler of the end."""

    __slots__ = (
        "allowances", "blocked", "connection", "end", "eof_received", "eof_sent", "fd", "from_end", "from_socket",
        "paused", "side", "until_eagain",
    )  # fmt: skip

    def __init__(
        self,
        end: End,
        connection: socket.socket,
        side: Side,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None,
    ) -> None:
        """See `End.join`. Nothing is attached before `start`."""
        super().__init__(end.pump, linger, on_end)
        self.end = end
        self.connection = connection
        self.fd = connection.fileno()
        self.side = side  # the socket's
        self.from_socket = self.from_end = 0  # bytes delivered to the end; to the socket
        self.until_eagain = False  # a short read does not mean that the socket is drained, see `socket_flow`
        self.eof_received = False  # the socket's end of file was read
        self.eof_sent = False  # the end's end of file was passed to the socket
        self.paused = False  # the end has no capacity: the socket is not read
        self.blocked = bool(end.buffered or end.eof_received)  # the socket has to take something first
        self.allowances: tuple[Allowance, Allowance] | None = None  # for bytes from the socket, and to it
        if throttle is not None:
            limiter = cast(Throttle, throttle)
            self.allowances = Allowance(limiter, self._rearm), Allowance(limiter, self._rearm)

    def start(self) -> Relay:
        """Attach both sides. `on_end` is never called from inside."""
        if self.end.closed:
            self.close(RelayEnd(Cause.RESET, self._end_side, ConnectionResetError("the carrier was lost")))
        else:
            self.end.handler = self
            try:
                self.pump.attach(self.fd, self)
            except OSError as error:
                self._fail_socket(error)
        if self.closed:
            self.pump.timers.wake_soon()
        return self

    # The relay

    @property
    def up(self) -> int:
        """See `Relay.up`."""
        return self.from_socket if self.side is Side.VISITOR else self.from_end

    @property
    def down(self) -> int:
        """See `Relay.down`."""
        return self.from_end if self.side is Side.VISITOR else self.from_socket

    def close(self, how: RelayEnd) -> None:
        """See `PumpRelay.close`. The end is reset unless both directions are finished."""
        if self.closed:
            return
        self.closed = True
        self.pump.timers.forget(self)
        for allowance in self.allowances or ():
            allowance.close()
        if self.end.buffered or not self.eof_sent or how.cause is Cause.RESET:
            reset_on_close(self.connection)
        self.pump.remove(self.fd, self)
        self.connection.close()
        self.pump.ended_relays.append((self, how))
        if how.cause is Cause.FINISHED:
            self.end.detach_handler()
        else:
            is_socket = how.cause is Cause.RESET and how.side is self.side
            reset = self.end.reset_after_delivery if is_socket else self.end.reset
            reset(reason_of(how.error) if how.error else how.cause.value)
        if self.end.closed:
            self.end.buffered = bytearray()

    # The pump's handler for the socket

    def on_event(self, events: int) -> None:
        """An event of the socket."""
        if events & READABLE and not self.eof_received:
            if events & UNTIL_EAGAIN:
                self.until_eagain = True
            if not self.paused:
                self._read()
        if self.blocked and events & WRITABLE and not self.closed:
            self._send_buffered()
        if events & BROKEN and (self.paused or self.eof_received) and not self.closed:
            self._check_error()
        if self.lingering:
            self.extend_deadline()

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Send bytes of the end to the socket and return how many it takes."""
        if self.failure is not None:  # the socket takes no more bytes: discard them
            return len(data)
        if self.blocked:
            return 0
        if self.allowances is not None:
            allowed = self.allowances[1].get()
            if allowed < len(data):  # the rest is buffered until the throttle or the socket allows it
                self.blocked = True
                data = data[:allowed]
        try:
            sent = self.connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail_write(error)
            return 0 if self.closed else len(data)
        self._count_sent(sent)
        if sent < len(data):
            self.blocked = True
        elif self.blocked:
            self._rearm()  # the socket could take more: epoll reports it again, for what is buffered from now on
        if self.lingering:
            self.extend_deadline()
        return sent

    def on_writable(self) -> None:
        """The end has capacity again: let epoll report what is pending in the socket."""
        if self.paused and not self.end.closed:
            self.paused = False
            self.pump.rearm(self.fd)

    def on_eof(self) -> None:
        """The end's end of file, behind all of its bytes: pass it on."""
        self._send_eof()

    def on_reset(self, error: OSError) -> None:
        """The end is gone. The bytes that came on it before are delivered first."""
        if self.closed:
            return
        if self.failure is not None:
            self.close(self.failure)
            return
        self.failure = RelayEnd(Cause.RESET, self._end_side, error)
        self.paused = True
        if self.end.buffered:
            self.start_lingering()
        else:
            self.close_after_delivery()

    def on_internal_error(self, error: Exception) -> None:
        """A bug; see `on_failure`."""
        self.on_failure(error)

    # Internal

    @property
    def _end_side(self) -> Side:
        return Side.SERVER if self.side is Side.VISITOR else Side.VISITOR

    def _read(self) -> None:
        """Read from the socket until it is drained, the end has no capacity, or the quantum is used up."""
        pump, end, receive_into = self.pump, self.end, self.connection.recv_into
        share = end.quantum
        while share > 0:
            capacity = end.send_capacity()
            if not capacity or self.closed:
                self.paused = True
                return
            wanted = min(capacity, pump.buffer_size)
            if self.allowances is not None and not (wanted := min(wanted, self.allowances[0].get())):
                return
            try:
                count = receive_into(pump.buffer, wanted)
            except BlockingIOError:
                break
            except OSError as error:
                self._fail_socket(error)
                return
            if not count:
                if not self.has_lost_eof(self.side):
                    self._on_socket_eof()
                if self.failure is not None:  # and it takes no more bytes: both directions are over
                    self.close(self.failure)
                return
            end.write(pump.view[:count])
            self.from_socket += count
            if self.allowances is not None:
                self.allowances[0].use(count)
            if count < wanted and not self.until_eagain:
                break
            share -= max(MIN_READ_COST, count)
        else:
            pump.rearm(self.fd)
            return
        if self.allowances is not None:
            self.allowances[0].give_back()

    def _on_socket_eof(self) -> None:
        self.eof_received = True
        self.end.finish()
        self._on_half_closed()

    def _send_buffered(self) -> None:
        """The socket may take bytes again: send what the end has buffered, or its end of file."""
        buffered = self.end.buffered
        if buffered:
            allowed = len(buffered) if self.allowances is None else min(len(buffered), self.allowances[1].get())
            try:
                with memoryview(buffered) as view:
                    sent = self.connection.send(view[:allowed]) if allowed else 0
            except BlockingIOError:
                return
            except OSError as error:
                self._fail_write(error)
                if not self.closed:
                    self.end.consume(len(buffered))
                return
            self._count_sent(sent)
            self.blocked = sent < len(buffered)
            if self.blocked and sent == allowed and allowed:
                self._rearm()
            self.end.consume(sent)  # which calls `on_eof` behind the last byte
        else:
            self.blocked = False
            if self.end.eof_received:
                self._send_eof()
        if self.failure is not None and not self.blocked and not self.closed and self.end.closed:
            self.close_after_delivery()

    def _count_sent(self, count: int) -> None:
        """`count` bytes were delivered to the socket."""
        self.from_end += count
        if self.allowances is not None:
            self.allowances[1].use(count)
            self.allowances[1].give_back()

    def _rearm(self) -> None:
        """Let epoll report what is pending in the socket, and whether it takes more."""
        if not self.closed:
            self.pump.rearm(self.fd)

    def _send_eof(self) -> None:
        if (
            self.eof_sent
        ):  # an end that had ended before it was joined may report it, and a WRITABLE event finds it, too
            return
        if self.eof_received:  # both directions are over: closing the socket says so
            self.eof_sent = True
            self.close(RelayEnd(Cause.FINISHED))
            return
        if self.failure is not None:  # the socket takes no more bytes, nor an end of file
            self.eof_sent = True
            return
        try:
            if not self.from_end:
                self.connection.send(b"")  # EAGAIN if the socket is still connecting
            self.connection.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.blocked = True
        except OSError as error:
            self._fail_write(error)
        else:
            self.eof_sent = True
            self._on_half_closed()

    def _on_half_closed(self) -> None:
        """One direction is over: finish if the other is, too; else start the linger time."""
        if self.eof_sent and self.eof_received:
            self.close(RelayEnd(Cause.FINISHED))
        elif not self.closed:
            self.start_lingering()

    def _fail_socket(self, error: OSError) -> None:
        """The socket is broken and all of its bytes have been read: end the relay and reset the end."""
        self.close(self.failure or RelayEnd(Cause.RESET, self.side, error))

    def _fail_write(self, error: OSError) -> None:
        """The socket takes no more bytes. Read those that it has sent before the relay ends; discard the end's."""
        if self.failure is not None or self.eof_received:
            self._fail_socket(error)
            return
        self.failure = RelayEnd(Cause.RESET, self.side, error)
        self.blocked = False
        self.start_lingering()
        self._rearm()

    @property
    def receiver(self) -> socket.socket:
        """See `PumpRelay.receiver`: only a failed end waits for the socket."""
        return self.connection

    def _check_error(self) -> None:
        """End the relay if the socket is broken; if it is only not being read, once its bytes are delivered."""
        error = pending_error(self.connection)
        if error is not None and self.eof_received:
            self._fail_socket(error)
        elif error is not None:
            self._fail_write(error)
