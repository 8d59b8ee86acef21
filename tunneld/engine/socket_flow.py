"""A flow: one direction of a pair of sockets in the pump, and how its bytes move.

A flow is in one of four moods, and only a system call moves it from one to another:

    drained   its source had nothing more; it waits until epoll tells of new bytes
    blocked   its target took no more; what was read is held, nothing more is read, it waits until epoll tells of room
    ended     its source's end was read; once all is delivered the end is passed on (`shutdown`), and the flow is `done`
    turned    it used up its share of one wake-up; it is armed again, and epoll tells of it behind the others

**Reading.** Small things go through the pump's one buffer: `recv_into`, then `send` of a slice. A read that does not
fill the buffer has drained the socket, so there is no second call just to hear EAGAIN. That inference fails where the
edge of an end was told together with bytes (nobody tells twice), and where a read stops in front of urgent data. So
after RDHUP, HUP, ERR or PRI the flow is `exact`: it reads on until the kernel says EAGAIN or end of file.

**Bulk.** A read that fills the buffer says that more stands behind it. From then on the flow splices through a borrowed
pipe, and a splice that brings less than a buffer switches back. Splice is believed when it moves bytes, never when it
refuses: in front of urgent data it says EAGAIN for ever, and a pipe can run out of slots before bytes. Every refusal is
checked by a plain read.

**Holding.** What was read and not delivered is held: at most one buffer or one pipe. A blocked flow does not read, so
the source's window closes and its sender stops: that is the whole flow control.

**Resets.** A flow that reads finds its source's reset by reading. One that does not read now (blocked, or its source
has ended) asks SO_ERROR when epoll tells of an error. A reset of one side ends the pair and resets the other.

**Connecting.** A socket still being dialled answers every read and write with EAGAIN and tells OUT when it is
connected, so bytes wait for it without a special case. Only an end must be kept back: `shutdown` would disconnect it.
An empty `send` finds out.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

import structlog

from tunneld.engine.engine import Cause, RelayEnd, Side
from tunneld.engine.failures import reset_on_close
from tunneld.engine.handover import FlowState
from tunneld.engine.throttle import Allowance

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe
    from tunneld.engine.socket_relay import SocketRelay

BROKEN = select.EPOLLERR | select.EPOLLHUP
INEXACT = BROKEN | select.EPOLLRDHUP | select.EPOLLPRI
READABLE = INEXACT | select.EPOLLIN
WRITABLE = BROKEN | select.EPOLLOUT

log = structlog.get_logger("relay")


class SocketFlow:
    """One direction of a pair, and the pump's handler for its source."""

    __slots__ = (
        "allowance", "blocked", "bulk", "done", "ended", "exact", "fd", "held", "moved", "pair", "pipe", "pump",
        "reverse", "side", "source", "target",
    )  # fmt: skip

    __deletable__ = ("pair", "reverse")  # so that they may be parted when compiled, too (mypyc)

    reverse: SocketFlow

    def __init__(self, pair: SocketRelay, side: Side, source: socket.socket, target: socket.socket) -> None:
        """The flow out of `source`, which is the pair's `side`, into `target`."""
        self.pair = pair
        self.pump = pair.pump
        self.side = side
        self.source = source
        self.target = target
        self.fd = source.fileno()
        self.moved = 0  # bytes the target has taken
        self.held = b""  # read and not yet taken; or `pipe` holds such bytes; never both
        self.pipe: Pipe | None = None
        self.blocked = self.ended = self.done = self.exact = self.bulk = False
        self.allowance = Allowance(pair.throttle, self._go_on) if pair.throttle is not None else None

    def on_event(self, events: int) -> None:
        """Something happened on this flow's source, which is also the target of the other flow."""
        pair, reverse = self.pair, self.reverse
        if events & READABLE and not self.ended:
            if events & INEXACT:
                self.exact = True
            if not self.blocked:
                self._serve()
        if reverse.blocked and events & WRITABLE and not pair.over:
            reverse._resume()
        if events & BROKEN and (self.blocked or self.ended) and not pair.over:
            self._look_for_error()
        if pair.lingering:
            pair.note_progress()

    def on_failure(self, error: Exception) -> None:
        """A bug of ours while serving this pair: it costs the pair, nothing else."""
        log.error("relay failed", exc_info=error)
        self.pair.end(RelayEnd(Cause.DROPPED))

    def on_stop(self) -> None:
        """The pump stops."""
        self.pair.end(RelayEnd(Cause.DROPPED))

    def close_source(self) -> None:
        """Close the source: with a reset where bytes on their way to it are lost, lest it pass for the whole."""
        reverse = self.reverse
        if reverse.held or reverse.pipe is not None or self.pair.broken:
            reset_on_close(self.source)
        if self.pump.handlers.get(self.fd) is self:
            del self.pump.handlers[self.fd]
        self.source.close()  # which takes it out of the epoll set, too

    def export(self) -> FlowState:
        """Let go of the source without closing it, and tell how far this direction has come."""
        self.pump.detach(self.fd, self)
        held = self.held
        while self.pipe is not None and self.pipe.count:
            part = os.read(self.pipe.read_fd, self.pipe.count)
            self.pipe.count -= len(part)
            held += part
        self.discard()
        return FlowState(self.moved, self.done, held)

    def restore(self, course: FlowState) -> None:
        """Go on from there, before the pump attaches the source. An end that was read is read once more."""
        self.moved, self.held = course.moved, course.held
        self.done = self.ended = course.done
        self.blocked = bool(course.held)

    def discard(self) -> None:
        """Forget what is held, after both sockets are closed."""
        self.held = b""
        if self.allowance is not None:
            self.allowance.end()
        if self.pipe is not None:
            self.pump.pipes.give_back(self.pipe)
            self.pipe = None

    def _serve(self) -> None:
        """Read and deliver until the source is drained, the target is full, or this turn's share is used up."""
        share = self.pump.quantum
        if self.allowance is not None:
            self._serve_slowly(self.allowance, share)
            return
        while share > 0:
            count = self._splice() if self.bulk else self._copy()
            if not count:
                return
            share -= count
        self.pump.rearm(self.fd)

    def _serve_slowly(self, allowance: Allowance, share: int) -> None:
        """The same where the tunnel's throttle has a say: never more than it allows, and never through a pipe."""
        while share > 0 and not self.pair.over:
            most = min(allowance.get(), self.pump.buffer_size)
            if not most:
                return
            before = self.moved + len(self.held)
            count = self._copy(most)
            allowance.use(self.moved + len(self.held) - before)
            if not count:
                allowance.rest()
                return
            share -= count
        if not self.pair.over:
            self.pump.rearm(self.fd)

    def _go_on(self) -> None:
        """The throttle allows more: let epoll tell what stands in the source."""
        if not self.pair.over:
            self.pump.rearm(self.fd)

    def _copy(self, most: int = 0) -> int:
        """Move one buffer, or at most so many bytes; their number, 0 where there is nothing more to do now."""
        pump = self.pump
        try:
            count = self.source.recv_into(pump.buffer, most)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.pair.fail_side(self.side, error)
            return 0
        if not count:
            self.ended = True
            self.pair.start_lingering()
            self._pass_end()
            return 0
        try:
            sent = self.target.send(pump.view[:count])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.pair.fail_side(self.reverse.side, error)
            return 0
        self.moved += sent
        if sent < count:
            self.held = bytes(pump.view[sent:count])
            self.blocked = True
            return 0
        if count == pump.buffer_size:
            self.bulk = True
        elif count != most and not self.exact:
            return 0
        return count

    def _splice(self) -> int:
        """Move one pipeful; the number of bytes, 0 where there is nothing more to do now."""
        pump = self.pump
        pipe = pump.pipes.borrow()
        if pipe is None:
            self.bulk = False
            return self._copy()
        try:
            count = pipe.fill(self.fd)
        except OSError:
            count = 0
        if not count:
            pump.pipes.give_back(pipe)
            return self._copy()
        if count < pump.buffer_size:
            self.bulk = False
        self.pipe = pipe
        return count if self._drain(pipe) else 0

    def _drain(self, pipe: Pipe) -> bool:
        """Deliver what the pipe holds and give it back; whether that succeeded."""
        try:
            while pipe.count:
                self.moved += pipe.drain(self.reverse.fd)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError as error:
            self.pair.fail_side(self.reverse.side, error)
            return False
        self.pump.pipes.give_back(pipe)
        self.pipe = None
        return True

    def _resume(self) -> None:
        """The target may take bytes again: deliver what is held, then what comes after it."""
        self.blocked = False
        if self.pipe is not None:
            if not self._drain(self.pipe):
                return
        elif self.held and not self._send_held():
            return
        self._serve()  # which reads a kept-back end once more

    def _send_held(self) -> bool:
        """Deliver the held bytes; whether that succeeded."""
        try:
            sent = self.target.send(self.held)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.pair.fail_side(self.reverse.side, error)
            return False
        self.moved += sent
        self.held = self.held[sent:]
        self.blocked = bool(self.held)
        return not self.blocked

    def _pass_end(self) -> None:
        """All that came before the source's end is delivered: pass the end on."""
        pair = self.pair
        if self.reverse.done:
            self.done = True
            pair.end(RelayEnd(Cause.FINISHED))
            return
        try:
            if not self.moved:
                self.target.send(b"")  # EAGAIN from a socket that is still connecting
            self.target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self.blocked = True
        except OSError as error:
            pair.fail_side(self.reverse.side, error)
        else:
            self.done = True

    def _look_for_error(self) -> None:
        """Ask the kernel whether the source is broken, without reading from it."""
        number = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.pair.fail_side(self.side, OSError(number, os.strerror(number)))
