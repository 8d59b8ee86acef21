"""A relay between two sockets in the pump: two flows with one end.

    both flows have passed on an end of file   FINISHED   both sockets were shut down in both directions; close them
    a side fails                               RESET      the other side is reset
    `linger` seconds without a byte            LINGERED   only after one side has ended
    `drop`, a bug, or the pump stops           DROPPED

See `relay` for what happens to the bytes of a side that fails, and for when a side is reset.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.handover import RelayState
from tunneld.engine.relay import PumpRelay
from tunneld.engine.socket_flow import SocketFlow

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump
    from tunneld.engine.throttle import Throttle


class SocketRelay(PumpRelay):
    """Two sockets joined in the pump."""

    __slots__ = ("from_server", "from_visitor", "side_failed", "throttle")

    def __init__(
        self,
        pump: Pump,
        visitor: socket.socket,
        server: socket.socket,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Throttle | None = None,
    ) -> None:
        """See `Engine.join`. The pump attaches the flows."""
        super().__init__(pump, linger, on_end)
        self.throttle = throttle
        self.side_failed = False
        self.from_visitor = SocketFlow(self, Side.VISITOR, visitor, server)
        self.from_server = SocketFlow(self, Side.SERVER, server, visitor)
        self.from_visitor.reverse = self.from_server
        self.from_server.reverse = self.from_visitor

    @property
    def up(self) -> int:
        """See `Relay.up`."""
        return self.from_visitor.moved

    @property
    def down(self) -> int:
        """See `Relay.down`."""
        return self.from_server.moved

    def export(self) -> RelayState:
        """Release both sockets without closing them, and return the state of the relay. `on_end` is not called."""
        self.closed = True
        rest = max(0.0, self.deadline - trio.current_time()) if self.lingering else None
        self.pump.timers.forget(self)
        up, down = self.from_visitor.export(), self.from_server.export()
        state = RelayState(self.from_visitor.source, self.from_server.source, up, down, self.linger, rest)
        self._break_cycle()
        return state

    def restore(self, state: RelayState) -> None:
        """Continue from `state`, before the pump attaches the flows."""
        self.from_visitor.restore(state.up)
        self.from_server.restore(state.down)
        if state.rest is not None:
            self.start_lingering()
            self.deadline = trio.current_time() + state.rest
            self.pump.timers.watch(self)

    def fail_side(self, side: Side, error: OSError) -> None:
        """One side failed and all of its bytes have been read: end the relay and reset the other side."""
        self.side_failed = True
        if self.failure is None:
            self.failure = RelayEnd(Cause.RESET, side, error)
        self.close_after_delivery()

    def fail_write(self, side: Side, error: OSError) -> None:
        """`side` takes no more bytes. Deliver the bytes that it has sent, then end the relay."""
        out = self.from_visitor if side is Side.VISITOR else self.from_server
        if self.failure is not None or (out.eof_received and not out.eof_sent):  # neither side takes any
            self.side_failed = True
            self.close(self.failure or RelayEnd(Cause.RESET, side, error))
            return
        self.failure = RelayEnd(Cause.RESET, side, error)
        out.reverse.stop()
        if out.eof_sent:
            self.close_after_delivery()
            return
        self.start_lingering()
        if not out.blocked:
            self.pump.rearm(out.fd)

    def close_after_delivery(self) -> None:
        """See `PumpRelay.close_after_delivery`. Nothing is read any more."""
        self.from_visitor.stopped = self.from_server.stopped = True
        super().close_after_delivery()

    @property
    def receiver(self) -> socket.socket:
        """See `PumpRelay.receiver`."""
        is_visitor = self.failure is not None and self.failure.side is Side.VISITOR
        return (self.from_server if is_visitor else self.from_visitor).source

    def close(self, how: RelayEnd) -> None:
        """See `PumpRelay.close`."""
        if self.closed:
            return
        self.closed = True
        if self.lingering:
            self.lingering = False
            self.pump.timers.forget(self)
        self.from_visitor.close_source()
        self.from_server.close_source()
        self.from_visitor.discard()
        self.from_server.discard()
        self.pump.ended_relays.append((self, how))

    def notify_ended(self, how: RelayEnd) -> None:
        """Call `on_end`. Break the reference cycle first, so that memory is freed without the garbage collector."""
        self._break_cycle()
        super().notify_ended(how)

    def _break_cycle(self) -> None:
        for flow in (self.from_visitor, self.from_server):
            del flow.reverse, flow.relay
