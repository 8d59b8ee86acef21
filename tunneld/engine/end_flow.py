"""Flows from a `BufferedEnd`: a channel of a carrier, a TLS connection, a Trio stream.

Bytes are delivered as they arrive. What the target does not take stays in the end's buffer, which the window bounds, so
a slow visitor stops the peer's sending on this channel and delays no other channel.

An end above a plain socket, such as that of requests, may have its bytes in a pipe (`PipeTaker`). They come
in front of what is buffered.

Every direction is resumed behind other ready ones, by `Pump.rearm` or `Scheduler.serve_soon`: nothing here calls into a
carrier while that reads, and no relay can keep the pump to itself.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.engine import Side
from tunneld.engine.flow import Flow, Target_co
from tunneld.engine.limits import UNLIMITED
from tunneld.engine.socket_end import SocketEnd

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe
    from tunneld.engine.relay import JoinedEnds


class FromEnd(Flow[BufferedEnd, Target_co]):
    """A flow whose source is a `BufferedEnd`: it is the end's `EndHandler`."""

    __slots__ = ()

    def start(self) -> None:
        """See `Flow.start`."""
        end = self.source
        if end.closed:
            raise ConnectionResetError(errno.ECONNRESET, "the carrier was lost")
        self.blocked = bool(end.buffered or end.eof_received)  # the target has to take something first
        end.linger = self.relay.linger
        end.handler = self
        if end.write_failure is not None:
            self.on_write_failed(end.write_failure)

    def deliver_first(self, data: bytes) -> None:
        """See `Flow.deliver_first`."""
        self.source.unread(data)
        self.blocked = True
        self.move_soon()

    def detach(self) -> None:
        """See `Flow.detach`."""
        self.source.handler = NO_HANDLER

    @property
    def undelivered(self) -> bool:
        """See `Flow.undelivered`."""
        return bool(self.source.buffered)

    def stop(self) -> None:
        """See `Flow.stop`. What arrives from now on is discarded, and the peer gets credit for it."""
        super().stop()
        self.source.consume(len(self.source.buffered))

    def discard(self) -> None:
        """See `Flow.discard`."""
        super().discard()
        if self.source.closed:
            self.source.buffered = bytearray()

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """See `EndHandler.on_data`."""
        raise NotImplementedError

    def on_writable(self) -> None:
        """The end has capacity again."""
        reverse = self.reverse
        if reverse.blocked and not self.relay.closed:
            reverse.resume()

    def on_eof(self) -> None:
        """The end's end of file, behind all of its bytes. It may be reported again."""
        if not self.eof_received:
            self.relay.source_ended(self)

    def on_write_failed(self, error: OSError) -> None:
        """The end takes no more bytes."""
        self.relay.target_failed(self.reverse, error)

    def on_reset(self, error: OSError) -> None:
        """The end is gone. The bytes that came on it before are delivered first."""
        self.relay.source_failed(self, error)

    def on_internal_error(self, error: Exception) -> None:
        """A bug; see `JoinedEnds.on_failure`."""
        self.relay.on_failure(error)

    # Internal

    def _is_done(self) -> None:
        """Everything in the buffer is delivered: pass on what comes behind it."""
        relay = self.relay
        self.blocked = False
        if self.source.closed and relay.failure is not None:
            relay.close_after_delivery()
        elif self.eof_received:
            relay.pass_eof(self)
        elif self.source.eof_received:
            relay.source_ended(self)


class EndToSocket(FromEnd[SocketEnd]):
    """From an end straight to a socket."""

    __slots__ = ("_pipe",)

    def __init__(self, relay: JoinedEnds, side: Side, source: BufferedEnd, target: SocketEnd) -> None:
        super().__init__(relay, side, source, target)
        self._pipe: Pipe | None = None  # with bytes of the source that are not delivered

    @property
    def undelivered(self) -> bool:
        """See `Flow.undelivered`."""
        return self._pipe is not None or bool(self.source.buffered)

    def discard(self) -> None:
        """See `Flow.discard`. The pipe is given back."""
        super().discard()
        if (pipe := self._pipe) is not None:
            self._pipe = None
            self.target.pump.pipes.give_back(pipe)

    def start(self) -> None:
        """See `Flow.start`. A throttle counts bytes before they are read, so it takes no pipe."""
        super().start()
        if self.allowance is None and not self.relay.closed:
            self.source.pipe_taker = self

    def detach(self) -> None:
        """See `Flow.detach`."""
        super().detach()
        self.source.pipe_taker = None

    def pipe_capacity(self) -> int:
        """See `PipeTaker.pipe_capacity`."""
        return 0 if self.blocked or self.stopped or self.source.buffered else UNLIMITED

    def take_pipe(self, pipe: Pipe) -> bool:
        """See `PipeTaker.take_pipe`."""
        self._pipe = pipe
        is_done = self._drain(pipe)
        if self.relay.lingering:
            self.relay.extend_deadline()
        return is_done or self.stopped

    def _drain(self, pipe: Pipe) -> bool:
        """Deliver the bytes in the pipe and give it back. Return whether all were delivered."""
        try:
            while pipe.count:
                self.moved += pipe.drain(self.target.fd)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError as error:
            self.relay.target_failed(self, error)  # which discards the pipe
            return False
        self._pipe = None
        self.target.pump.pipes.give_back(pipe)
        return True

    def on_eof(self) -> None:
        """See `FromEnd.on_eof`."""
        if self._pipe is None:  # else behind that
            super().on_eof()

    def move_soon(self) -> None:
        """See `Flow.move_soon`: let epoll report whether the socket takes more."""
        if not self.relay.closed:
            self.target.pump.rearm(self.target.fd)

    def on_data(self, data: memoryview) -> int:
        """Send bytes of the end to the socket and return how many it takes."""
        if self.stopped:
            return len(data)
        if self.blocked:
            return 0
        size = len(data)
        allowance = self.allowance
        if allowance is not None:
            allowed = allowance.get()
            if allowed < size:  # the rest is buffered until the throttle or the socket allows it
                self.blocked = True
                data = data[:allowed]
        try:
            sent = self.target.connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.relay.target_failed(self, error)
            return 0 if self.relay.closed else size
        self.moved += sent
        if allowance is not None:
            allowance.use(sent)
            allowance.give_back()
        if sent < len(data):
            self.blocked = True
        elif self.blocked:
            self.move_soon()  # the socket could take more: epoll reports it again, for what is buffered from now on
        if self.relay.lingering:
            self.relay.extend_deadline()
        return sent

    def resume(self) -> None:
        """See `Flow.resume`."""
        if self._pipe is not None:
            if self._drain(self._pipe):
                self._pipe_is_done()
            return
        buffered = self.source.buffered
        if not buffered:
            self._is_done()
            return
        size, allowance = len(buffered), self.allowance
        allowed = size if allowance is None else min(size, allowance.get())
        try:
            with memoryview(buffered) as view:
                sent = self.target.connection.send(view[:allowed]) if allowed else 0
        except BlockingIOError:
            return
        except OSError as error:
            self.relay.target_failed(self, error)
            return
        self.moved += sent
        if allowance is not None:
            allowance.use(sent)
            allowance.give_back()
        self.blocked = sent < size
        if self.blocked and sent == allowed and allowed:
            self.move_soon()
        self.source.consume(sent)  # which calls `on_eof` behind the last byte
        if not self.blocked and not self.relay.closed and self.source.closed:
            self._is_done()

    def _pipe_is_done(self) -> None:
        """What waited in a pipe is delivered. What is buffered comes behind it; the socket takes more."""
        if self.source.buffered:
            self.move_soon()
            return
        self._is_done()
        if not self.relay.closed and not self.stopped:
            self.source.read_on()


class EndToEnd(FromEnd[BufferedEnd]):
    """From any end to any other. Bytes that the target does not take at once wait in the source's buffer."""

    __slots__ = ("_scheduled",)

    def __init__(self, relay: JoinedEnds, side: Side, source: BufferedEnd, target: BufferedEnd) -> None:
        super().__init__(relay, side, source, target)
        self._scheduled = False

    def start(self) -> None:
        """See `Flow.start`."""
        super().start()
        if self.blocked:
            self.move_soon()

    def move_soon(self) -> None:
        """See `Flow.move_soon`."""
        if not self._scheduled:
            self._scheduled = True
            self.relay.engine.serve_soon(self)

    def resume(self) -> None:
        """See `Flow.resume`: not now, since the target may be in the middle of a write."""
        self.move_soon()

    def on_data(self, data: memoryview) -> int:
        """Write bytes of the end to the other and return how many it takes."""
        if self.stopped:
            return len(data)
        if self.blocked:
            return 0
        taken = self._forward(data)
        if self.relay.lingering:
            self.relay.extend_deadline()
        return taken

    def on_turn(self) -> None:
        """Deliver what is buffered, at most a quantum of it."""
        self._scheduled = False
        end = self.source
        if self.relay.closed or self.stopped or not self.blocked:
            return
        self.blocked = False
        if not end.buffered:
            self._is_done()
            return
        with memoryview(end.buffered) as view:
            quantum = min(self.relay.engine.quantum, self.target.quantum)
            taken = self._forward(view[:quantum])
        if end.buffered and taken == quantum and not self.blocked:
            self.blocked = True
            self.move_soon()
        if taken:
            end.consume(taken)
        if self.relay.lingering:
            self.relay.extend_deadline()
        if not end.buffered and not self.blocked and not self.relay.closed and end.closed:
            self._is_done()

    def _forward(self, data: memoryview) -> int:
        """Write as much as the target and the throttle allow; set `blocked` unless that is all. Return how much."""
        target, allowance, size, taken = self.target, self.allowance, len(data), 0
        while taken < size:
            count = min(target.send_capacity(), size - taken)
            if self.stopped:  # the target has failed meanwhile: discard the rest
                return size
            if allowance is not None and count:
                count = min(count, allowance.get())
            if not count:
                self.blocked = True
                break
            target.write(data[taken : taken + count])
            taken += count
            self.moved += count
            if allowance is not None:
                allowance.use(count)
        if allowance is not None:
            allowance.give_back()
        return taken
