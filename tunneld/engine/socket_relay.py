"""A relay between two sockets in the pump: two flows with one end.

A relay ends once, in one of four ways (`Cause`). At that moment both sockets are closed, buffered bytes are dropped and
pipes are given back. `on_end` is called after the batch, so that the callback may call the pump.

    both flows have passed on an end of file   FINISHED   both sockets were shut down in both directions; close them
    a side fails                               RESET      the other side is reset
    `linger` seconds without a byte            LINGERED   only after one side has ended
    `drop`, a bug, or the pump stops           DROPPED

A connection for which bytes were still undelivered is always closed with a reset, so that its peer cannot take a part
for the whole.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.engine.handover import RelayState
from tunneld.engine.socket_flow import SocketFlow

if TYPE_CHECKING:
    from tunneld.engine.pump import Pump
    from tunneld.engine.throttle import Throttle

log = structlog.get_logger("engine")


class SocketRelay:
    """Two sockets joined in the pump; the `Relay` that the owner holds."""

    __slots__ = (
        "closed", "deadline", "from_server", "from_visitor", "linger", "lingering", "moved_before", "on_end", "pump",
        "side_failed", "throttle",
    )  # fmt: skip

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
        self.pump = pump
        self.throttle = throttle
        self.linger = linger
        self.on_end = on_end
        self.closed = self.side_failed = False
        self.lingering = False  # one side has ended
        self.deadline = 0.0  # Trio time at which a lingering relay ends
        self.moved_before = 0  # bytes that had moved when the deadline was set
        self.from_visitor = SocketFlow(self, Side.VISITOR, visitor, server)
        self.from_server = SocketFlow(self, Side.SERVER, server, visitor)
        self.from_visitor.reverse = self.from_server
        self.from_server.reverse = self.from_visitor

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""
        return self.from_visitor.moved

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""
        return self.from_server.moved

    def drop(self) -> None:
        """See `Relay.drop`."""
        self.close(RelayEnd(Cause.DROPPED))
        self.pump.timers.wake_soon()

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
        """One side failed: end the relay and reset the other side."""
        self.side_failed = True
        self.close(RelayEnd(Cause.RESET, side, error))

    def close(self, how: RelayEnd) -> None:
        """Close both sockets now; `on_end` is called after the pump's batch. May be called again."""
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
        """Call `on_end`, and break the reference cycle, so that memory is freed without the garbage collector."""
        self._break_cycle()
        try:
            self.on_end(self, how)
        except Exception as error:
            log.exception("on_end callback failed: internal error", exc_info=error)

    def start_lingering(self) -> None:
        """One side has ended: from now on the relay ends after `linger` seconds without a byte in either direction."""
        if self.lingering:
            return
        self.lingering = True
        self.moved_before = self.up + self.down
        self.deadline = trio.current_time() + self.linger
        self.pump.timers.watch(self)

    def extend_deadline(self) -> None:
        """Move the deadline back if bytes have moved since it was set."""
        moved = self.up + self.down
        if moved != self.moved_before:
            self.moved_before = moved
            self.deadline = trio.current_time() + self.linger

    def on_deadline(self) -> None:
        """No byte has moved for `linger` seconds."""
        self.close(RelayEnd(Cause.LINGERED))

    def _break_cycle(self) -> None:
        for flow in (self.from_visitor, self.from_server):
            del flow.reverse, flow.relay
