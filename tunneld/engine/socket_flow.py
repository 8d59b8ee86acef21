"""From one socket to another: `recv` and `send`, or `splice`.

**Reading.** Small amounts go through the pump's one buffer: `recv_into`, then `send` of a slice. A read that does not
fill the buffer has drained the socket, which saves a second call that would only return EAGAIN. This conclusion is
wrong if epoll reported an end of file together with bytes (it will not report it again), and if the read stopped in
front of urgent data. So after RDHUP, HUP, ERR or PRI the flow reads `until_eagain`: until the kernel says EAGAIN or end
of file.

**Splicing.** A read that fills the buffer shows that more bytes follow. From then on the flow splices through a
borrowed pipe, until a splice brings less than a buffer. A splice is trusted when it moves bytes, and never when it
refuses: in front of urgent data it says EAGAIN for ever, and a pipe can run out of slots before it is full. Each
refusal is checked by a plain read.

**Buffering.** What was read and not delivered stays in the flow: at most one buffer or one pipe.

**Resets.** A flow that reads finds a reset of its source by reading. A flow that does not read now (blocked, or after
the end of file) asks for SO_ERROR when epoll reports an error.

**Connecting.** A socket that is still connecting answers each read and write with EAGAIN, and epoll reports OUT once it
is connected. So bytes wait for it without a special case.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tunneld.engine.engine import Side
from tunneld.engine.events import BROKEN, READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.flow import Flow, Target_co
from tunneld.engine.handover import FlowState
from tunneld.engine.limits import UNLIMITED
from tunneld.engine.socket_end import SocketEnd
from tunneld.engine.throttle import Allowance
from tunneld.net.sockets import pending_error

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe
    from tunneld.engine.relay import JoinedEnds


class FromSocket(Flow[SocketEnd, Target_co]):
    """A flow whose source is a socket: it is the pump's handler for that."""

    __slots__ = ("connection", "fd", "pipe", "pump", "splicing", "until_eagain")

    def __init__(self, relay: JoinedEnds, side: Side, source: SocketEnd, target: Target_co) -> None:
        super().__init__(relay, side, source, target)
        self.connection = source.connection
        self.fd = source.fd
        self.pump = source.pump
        self.until_eagain = False  # a short read does not mean that the socket is drained
        self.splicing = False  # more bytes follow
        self.pipe: Pipe | None = None  # with bytes that were read and not delivered

    def start(self) -> None:
        """See `Flow.start`. epoll reports everything that is pending already."""
        self.pump.attach(self.fd, self)

    def detach(self) -> None:
        """See `Flow.detach`. Closing the socket takes it out of the epoll set, too."""
        self.pump.remove(self.fd, self)

    @property
    def undelivered(self) -> bool:
        """See `Flow.undelivered`."""
        return self.pipe is not None

    def discard(self) -> None:
        """See `Flow.discard`. The pipe is given back."""
        super().discard()
        if self.pipe is not None:
            self.pump.pipes.give_back(self.pipe)
            self.pipe = None

    def move(self) -> None:
        """Read and deliver until the source is drained, the target is full, or the quantum is used up."""
        raise NotImplementedError

    def move_soon(self) -> None:
        """See `Flow.move_soon`: let epoll report what is pending in the source."""
        if not self.relay.closed and not self.stopped:
            self.pump.rearm(self.fd)

    def on_event(self, events: int) -> None:
        """An event of this flow's source, which is also the target of the reverse flow."""
        relay, reverse = self.relay, self.reverse
        if events & READABLE and not self.eof_received and not self.stopped:
            if events & UNTIL_EAGAIN:
                self.until_eagain = True
            if not self.blocked:
                self.move()
        if reverse.blocked and events & WRITABLE and not relay.closed:
            reverse.resume()
        if events & BROKEN and (self.blocked or self.eof_received or self.stopped) and not relay.closed:
            self._check_error()
        if relay.lingering:
            relay.extend_deadline()

    def fill_pipe(self, max_bytes: int) -> int:
        """Splice into a borrowed pipe and return the number of bytes. 0: a plain read has to tell why there are none.
        Less: the source has failed.
        """
        pump = self.pump
        try:
            pipe = pump.pipes.fill(self.fd, max_bytes)
        except OSError as error:
            self.relay.source_failed(self, error)
            return -1
        if pipe is None:
            return 0
        if pipe.count < pump.buffer_size:
            self.splicing = False
        self.pipe = pipe
        return pipe.count

    def _check_error(self) -> None:
        """End the relay if the source is broken; if this flow is only blocked, once its bytes are delivered."""
        error = pending_error(self.connection)
        if error is not None and self.blocked and not self.eof_received:
            self.relay.target_failed(self.reverse, error)
        elif error is not None:
            self.relay.source_failed(self, error)


class SocketFlow(FromSocket[SocketEnd]):
    """From one socket to another."""

    __slots__ = ("buffered", "target_connection")

    def __init__(self, relay: JoinedEnds, side: Side, source: SocketEnd, target: SocketEnd) -> None:
        super().__init__(relay, side, source, target)
        self.target_connection = target.connection
        self.buffered = b""  # bytes read and not delivered; or they are in `pipe`; never in both

    @property
    def undelivered(self) -> bool:
        """See `Flow.undelivered`."""
        return bool(self.buffered) or self.pipe is not None

    def deliver_first(self, data: bytes) -> None:
        """See `Flow.deliver_first`. Epoll has not yet reported that the target takes bytes."""
        self.buffered = data
        self.blocked = True

    def export(self) -> FlowState:
        """See `Flow.export`."""
        self.pump.detach(self.fd, self)
        buffered = self.buffered
        while self.pipe is not None and self.pipe.count:
            part = os.read(self.pipe.read_fd, self.pipe.count)
            self.pipe.count -= len(part)
            buffered += part
        self.discard()
        return FlowState(self.moved, self.eof_sent, buffered)

    def restore(self, state: FlowState) -> None:
        """See `Flow.restore`. An end of file that was read and not passed on is read again."""
        self.moved, self.buffered = state.moved, state.held
        self.eof_sent = self.eof_received = state.done
        self.blocked = bool(state.held)

    def discard(self) -> None:
        """See `Flow.discard`."""
        super().discard()
        self.buffered = b""

    def move(self) -> None:
        """See `FromSocket.move`."""
        share = self.pump.quantum
        if self.allowance is not None:
            self._move_throttled(self.allowance, share)
            return
        while share > 0:
            count = self._splice() if self.splicing else self._copy()
            if not count:
                return
            share -= count
        self.pump.rearm(self.fd)

    def resume(self) -> None:
        """See `Flow.resume`."""
        self.blocked = False
        if self.pipe is not None:
            if not self._drain(self.pipe):
                return
        elif self.buffered and not self._send_buffered():
            return
        if self.eof_received:
            self.relay.pass_eof(self)
        else:
            self.move()

    def _move_throttled(self, allowance: Allowance, share: int) -> None:
        """Move within the allowance of the tunnel's throttle; never through a pipe."""
        while share > 0 and not self.relay.closed and not self.stopped:
            max_bytes = min(allowance.get(), self.pump.buffer_size)
            if not max_bytes:
                return
            before = self.moved + len(self.buffered)
            count = self._copy(max_bytes)
            allowance.use(self.moved + len(self.buffered) - before)
            if not count:
                allowance.give_back()
                return
            share -= count
        self.move_soon()

    def _copy(self, max_bytes: int = 0) -> int:
        """Move one buffer, or at most `max_bytes` if that is not 0. Return the number of bytes read, or 0 if the flow
        has to wait or has ended.
        """
        pump = self.pump
        try:
            count = self.connection.recv_into(pump.buffer, max_bytes)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.relay.source_failed(self, error)
            return 0
        if not count:
            self.relay.source_ended(self)
            return 0
        try:
            sent = self.target_connection.send(pump.view[:count])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.relay.target_failed(self, error)
            return 0
        self.moved += sent
        if sent < count:
            self.buffered = bytes(pump.view[sent:count])
            self.blocked = True
            return 0
        if count == pump.buffer_size:
            self.splicing = True
        elif count != max_bytes and not self.until_eagain:
            return 0
        return count

    def _splice(self) -> int:
        """Move up to one pipe. Return the number of bytes, or 0 if the flow has to wait or has ended."""
        count = self.fill_pipe(UNLIMITED)
        if not count:
            return self._copy()
        return count if self.pipe is not None and self._drain(self.pipe) else 0

    def _drain(self, pipe: Pipe) -> bool:
        """Deliver the bytes in the pipe and give it back. Return whether all were delivered."""
        try:
            while pipe.count:
                self.moved += pipe.drain(self.target.fd)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError as error:
            self.relay.target_failed(self, error)
            return False
        self.pump.pipes.give_back(pipe)
        self.pipe = None
        return True

    def _send_buffered(self) -> bool:
        """Deliver the buffered bytes. Return whether all were delivered."""
        try:
            sent = self.target_connection.send(self.buffered)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.relay.target_failed(self, error)
            return False
        self.moved += sent
        self.buffered = self.buffered[sent:]
        self.blocked = bool(self.buffered)
        return not self.blocked
