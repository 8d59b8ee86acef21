"""From a socket to a `BufferedEnd`: through the pump's buffer, or a pipe.

As much is read as the end has `send_capacity`, so a slow peer stops the sender behind the socket. Once a quantum was
read and more bytes may follow, an end above a plain socket takes them in a pipe (`BufferedEnd.pipe_capacity`), as
between two sockets, see `socket_flow`.
"""

from __future__ import annotations

from typing import Final

from tunneld.engine.end import BufferedEnd
from tunneld.engine.socket_flow import FromSocket

MIN_READ_COST: Final = 2048
"""Bytes of the quantum that each read costs at least. If the peer asks for fragments of one byte, a short read costs as
much time as a long one.
"""


class SocketToEnd(FromSocket[BufferedEnd]):
    """The flow; the bytes that it has read and not delivered are in its pipe, or the end's."""

    __slots__ = ()

    def deliver_first(self, data: bytes) -> None:
        """See `Flow.deliver_first`."""
        try:
            self.target.send(data)
        except OSError as error:
            self.relay.target_failed(self, error)
        else:
            self.moved += len(data)

    def resume(self) -> None:
        """See `Flow.resume`."""
        self.blocked = False
        if self.pipe is None or self._drain():
            self.move_soon()

    def move(self) -> None:
        """Read from the socket until it is drained, the end has no capacity, or the quantum is used up."""
        pump, end = self.pump, self.target
        receive_into, allowance = self.connection.recv_into, self.allowance
        if self.splicing and not self._splice():
            return
        share = min(pump.quantum, end.quantum)
        while share > 0:
            wanted = end.send_capacity()
            if not wanted or self.stopped:
                self.blocked = not self.stopped
                return
            if wanted > pump.buffer_size:  # `min` takes as long as a call of our own
                wanted = pump.buffer_size
            if allowance is not None and not (wanted := min(wanted, allowance.get())):
                return
            try:
                count = receive_into(pump.buffer, wanted)
            except BlockingIOError:
                break
            except OSError as error:
                self.relay.source_failed(self, error)
                return
            if not count:
                self.relay.source_ended(self)
                return
            end.write(pump.view[:count])
            self.moved += count
            if allowance is not None:
                allowance.use(count)
            if count < wanted and not self.until_eagain:
                break
            share -= max(MIN_READ_COST, count)
        else:
            self.splicing = allowance is None and end.pipe_capacity() > 0
            pump.rearm(self.fd)
            return
        if allowance is not None:
            allowance.give_back()

    def _splice(self) -> bool:
        """Move bytes in pipes. Returns whether a plain read has to go on, and tell why there are no more; otherwise
        the quantum is used up, or the flow has to wait or has ended.
        """
        end, share = self.target, self.pump.quantum
        while self.splicing and end.send_capacity() and not self.stopped:
            if share <= 0:
                self.pump.rearm(self.fd)
                return False
            capacity = end.pipe_capacity()
            count = self.fill_pipe(capacity) if capacity else 0
            if count < 0 or (count and not self._drain()):
                return False
            if not count:
                self.splicing = False
            share -= count
        return not self.relay.closed

    def _drain(self) -> bool:
        """Deliver the bytes in the pipe and give it back. Return whether all were delivered."""
        pipe = self.pipe
        assert pipe is not None
        count = pipe.count
        self.target.write_pipe(pipe)
        self.moved += count - pipe.count
        if self.pipe is None:  # the relay has ended meanwhile
            return False
        if pipe.count:
            self.blocked = True
            return False
        self.pipe = None
        self.pump.pipes.give_back(pipe)
        return not self.relay.closed and not self.stopped
