"""One direction of a relay between two sockets in the pump, and how its bytes move.

A flow is in one of four states, and only a system call moves it from one to another:

    drained    the source had no more bytes; the flow waits until epoll reports new ones
    blocked    the target took no more; what was read is buffered, nothing more is read, and the flow waits until epoll
               reports space in the target's send buffer
    ended      the source's end of file was read (`eof_received`); once everything is delivered it is passed on
               (`shutdown`, `eof_sent`)
    preempted  the flow used up its quantum; it is rearmed, and epoll reports it again behind other ready sockets

**Reading.** Small amounts go through the pump's one buffer: `recv_into`, then `send` of a slice. A read that does not
fill the buffer has drained the socket, which saves a second call that would only return EAGAIN. This conclusion is
wrong if epoll reported an end of file together with bytes (it will not report it again), and if the read stopped in
front of urgent data. So after RDHUP, HUP, ERR or PRI the flow reads `until_eagain`: until the kernel says EAGAIN or end
of file.

**Splicing.** A read that fills the buffer shows that more bytes follow. From then on the flow splices through a
borrowed pipe, until a splice brings less than a buffer. A splice is trusted when it moves bytes, and never when it
refuses: in front of urgent data it says EAGAIN for ever, and a pipe can run out of slots before it is full. Each
refusal is checked by a plain read.

**Buffering.** What was read and not delivered stays in the flow: at most one buffer or one pipe. A blocked flow does
not read, so the source's TCP window closes and its sender stops. That is all the flow control there is.

**Resets.** A flow that reads finds a reset of its source by reading. A flow that does not read now (blocked, or after
the end of file) asks for SO_ERROR when epoll reports an error. A reset of one side ends the relay and resets the other
side.

**Connecting.** A socket that is still connecting answers each read and write with EAGAIN, and epoll reports OUT once it
is connected. So bytes wait for it without a special case. Only the end of file must be kept back, since `shutdown`
would disconnect the socket; an empty `send` finds out.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

from tunneld.engine.engine import Cause, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.handover import FlowState
from tunneld.engine.throttle import Allowance
from tunneld.net.sockets import pending_error

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe
    from tunneld.engine.socket_relay import SocketRelay

BROKEN = select.EPOLLERR | select.EPOLLHUP
"""Events of a socket that may be broken."""
UNTIL_EAGAIN = BROKEN | select.EPOLLRDHUP | select.EPOLLPRI
"""Events after which a short read does not mean that the socket is drained."""
READABLE = UNTIL_EAGAIN | select.EPOLLIN
"""Events after which a read may succeed or report an end."""
WRITABLE = BROKEN | select.EPOLLOUT
"""Events after which a write may succeed or report an error."""


class SocketFlow:
    """One direction of a `SocketRelay`, and the pump's handler for its source."""

    __slots__ = (
        "allowance", "blocked", "buffered", "eof_received", "eof_sent", "fd", "moved", "pipe", "pump", "relay",
        "reverse", "side", "source", "splicing", "stopped", "target", "until_eagain",
    )  # fmt: skip

    __deletable__ = ("relay", "reverse")  # `notify_ended` breaks the reference cycle; mypyc wants to be told

    reverse: SocketFlow

    def __init__(self, relay: SocketRelay, side: Side, source: socket.socket, target: socket.socket) -> None:
        """The flow from `source`, which is the relay's `side`, to `target`."""
        self.relay = relay
        self.pump = relay.pump
        self.side = side
        self.source = source
        self.target = target
        self.fd = source.fileno()
        self.moved = 0  # bytes delivered to the target
        self.buffered = b""  # bytes read and not delivered; or they are in `pipe`; never in both
        self.pipe: Pipe | None = None
        self.blocked = self.eof_received = self.eof_sent = self.until_eagain = self.splicing = False
        self.stopped = False  # the target takes no more bytes, ever: the source is not read
        self.allowance = Allowance(relay.throttle, self._rearm) if relay.throttle is not None else None

    def on_event(self, events: int) -> None:
        """An event of this flow's source, which is also the target of the reverse flow."""
        relay, reverse = self.relay, self.reverse
        if events & READABLE and not self.eof_received and not self.stopped:
            if events & UNTIL_EAGAIN:
                self.until_eagain = True
            if not self.blocked:
                self._move()
        if reverse.blocked and events & WRITABLE and not relay.closed:
            reverse._resume()
        if events & BROKEN and (self.blocked or self.eof_received or self.stopped) and not relay.closed:
            self._check_error()
        if relay.lingering:
            relay.extend_deadline()

    def on_failure(self, error: Exception) -> None:
        """See `PumpRelay.on_failure`."""
        self.relay.on_failure(error)

    def on_stop(self) -> None:
        """See `PumpRelay.on_stop`."""
        self.relay.on_stop()

    def close_source(self) -> None:
        """Close the source, with a reset unless it was told the end of the bytes for it: it must not take a part for
        the whole.
        """
        reverse = self.reverse
        if reverse.buffered or reverse.pipe is not None or not reverse.eof_sent or self.relay.side_failed:
            reset_on_close(self.source)
        self.pump.remove(self.fd, self)
        self.source.close()  # which takes it out of the epoll set, too

    def export(self) -> FlowState:
        """Release the source without closing it, and return the state of this direction."""
        self.pump.detach(self.fd, self)
        buffered = self.buffered
        while self.pipe is not None and self.pipe.count:
            part = os.read(self.pipe.read_fd, self.pipe.count)
            self.pipe.count -= len(part)
            buffered += part
        self.discard()
        return FlowState(self.moved, self.eof_sent, buffered)

    def restore(self, state: FlowState) -> None:
        """Continue from `state`, before the pump attaches the source. An end of file that was read is read again."""
        self.moved, self.buffered = state.moved, state.held
        self.eof_sent = self.eof_received = state.done
        self.blocked = bool(state.held)

    def discard(self) -> None:
        """Forget buffered bytes and return the pipe and the unused tokens."""
        self.buffered = b""
        if self.allowance is not None:
            self.allowance.close()
        if self.pipe is not None:
            self.pump.pipes.give_back(self.pipe)
            self.pipe = None

    def stop(self) -> None:
        """The target takes no more bytes: discard what is buffered for it, and read no more."""
        self.stopped = True
        self.blocked = False
        self.discard()

    def _move(self) -> None:
        """Read and deliver until the source is drained, the target is full, or the quantum is used up."""
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

    def _move_throttled(self, allowance: Allowance, share: int) -> None:
        """The same within the allowance of the tunnel's throttle; never through a pipe."""
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
        self._rearm()

    def _rearm(self) -> None:
        """The throttle has granted more tokens: let epoll report what is pending in the source."""
        if not self.relay.closed and not self.stopped:
            self.pump.rearm(self.fd)

    def _copy(self, max_bytes: int = 0) -> int:
        """Move one buffer, or at most `max_bytes` if that is not 0. Return the number of bytes read, or 0 if the flow
        has to wait or has ended.
        """
        pump = self.pump
        try:
            count = self.source.recv_into(pump.buffer, max_bytes)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.relay.fail_side(self.side, error)
            return 0
        if not count and self.relay.has_lost_eof(self.side):
            self.relay.close_after_delivery()
            return 0
        if not count:
            self.eof_received = True
            self.relay.start_lingering()
            self._send_eof()
            return 0
        try:
            sent = self.target.send(pump.view[:count])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.relay.fail_write(self.reverse.side, error)
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
        pump = self.pump
        pipe = pump.pipes.borrow()
        if pipe is None:
            self.splicing = False
            return self._copy()
        try:
            count = pipe.fill(self.fd)
        except OSError:
            count = 0
        if not count:
            pump.pipes.give_back(pipe)
            return self._copy()
        if count < pump.buffer_size:
            self.splicing = False
        self.pipe = pipe
        return count if self._drain(pipe) else 0

    def _drain(self, pipe: Pipe) -> bool:
        """Deliver the bytes in the pipe and give it back. Return whether all were delivered."""
        try:
            while pipe.count:
                self.moved += pipe.drain(self.reverse.fd)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError as error:
            self.relay.fail_write(self.reverse.side, error)
            return False
        self.pump.pipes.give_back(pipe)
        self.pipe = None
        return True

    def _resume(self) -> None:
        """The target may take bytes again: deliver the buffered ones, then read on."""
        self.blocked = False
        if self.pipe is not None:
            if not self._drain(self.pipe):
                return
        elif self.buffered and not self._send_buffered():
            return
        self._move()  # which reads an end of file that was kept back once more

    def _send_buffered(self) -> bool:
        """Deliver the buffered bytes. Return whether all were delivered."""
        try:
            sent = self.target.send(self.buffered)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.relay.fail_write(self.reverse.side, error)
            return False
        self.moved += sent
        self.buffered = self.buffered[sent:]
        self.blocked = bool(self.buffered)
        return not self.blocked

    def _send_eof(self) -> None:
        """Pass the source's end of file on; all bytes before it have been delivered."""
        relay = self.relay
        if self.reverse.eof_sent:
            self.eof_sent = True
            relay.close(RelayEnd(Cause.FINISHED))
            return
        try:
            if not self.moved:
                self.target.send(b"")  # EAGAIN if the socket is still connecting
            self.target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.blocked = True
        except OSError as error:
            relay.fail_write(self.reverse.side, error)
        else:
            self.eof_sent = True
            if relay.failure is not None:
                relay.close_after_delivery()

    def _check_error(self) -> None:
        """End the relay if the source is broken; if this flow is only blocked, once its bytes are delivered."""
        error = pending_error(self.source)
        if error is not None and self.blocked and not self.eof_received:
            self.relay.fail_write(self.side, error)
        elif error is not None:
            self.relay.fail_side(self.side, error)
