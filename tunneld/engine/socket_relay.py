"""A pair of sockets in the pump: two flows, and one end for both.

A pair ends once, in one of four ways (`Cause`), and always whole: both sockets are closed at that moment, what a flow
still held is forgotten, its pipe goes back. The owner is told a little later, when the pump has finished what it is at,
so that its callback never finds the pump in the middle of something.

    both flows done                 FINISHED   what was shut down in both directions is closed
    a side breaks                   RESET      the other side is reset
    `linger` seconds without a byte LINGERED   after one side has ended
    `drop()`, a bug, the pump stops DROPPED

A connection into which undelivered bytes were flowing is always closed with a reset, so that its peer cannot take a
part for the whole.
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

log = structlog.get_logger("relay")


class SocketRelay:
    """Two sockets joined in the pump: the `Relay` its owner holds."""

    __slots__ = (
        "broken",
        "deadline",
        "from_server",
        "from_visitor",
        "linger",
        "lingering",
        "on_end",
        "over",
        "pump",
        "seen",
        "throttle",
    )

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
        self.over = self.broken = self.lingering = False
        self.deadline = 0.0  # Trio time at which a lingering pair ends
        self.seen = 0  # bytes moved when the deadline was set
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
        self.end(RelayEnd(Cause.DROPPED))
        self.pump.timers.wake_soon()

    def export(self) -> RelayState:
        """Let go of both sockets without closing them; the owner is told nothing."""
        self.over = True
        rest = max(0.0, self.deadline - trio.current_time()) if self.lingering else None
        self.pump.timers.forget(self)
        up, down = self.from_visitor.export(), self.from_server.export()
        lifted = RelayState(self.from_visitor.source, self.from_server.source, up, down, self.linger, rest)
        for flow in (self.from_visitor, self.from_server):
            del flow.reverse, flow.pair
        return lifted

    def restore(self, lifted: RelayState) -> None:
        """Go on from there, before the pump attaches the flows."""
        self.from_visitor.restore(lifted.up)
        self.from_server.restore(lifted.down)
        if lifted.rest is not None:
            self.start_lingering()
            self.deadline = trio.current_time() + lifted.rest
            self.pump.timers.watch(self)

    def fail_side(self, side: Side, error: OSError) -> None:
        """One side is broken: the other is told in kind."""
        self.broken = True
        self.end(RelayEnd(Cause.RESET, side, error))

    def end(self, how: RelayEnd) -> None:
        """Close both sockets now; the owner hears of it when the pump has finished its batch. Harmless if repeated."""
        if self.over:
            return
        self.over = True
        if self.lingering:
            self.lingering = False
            self.pump.timers.forget(self)
        self.from_visitor.close_source()
        self.from_server.close_source()
        self.from_visitor.discard()
        self.from_server.discard()
        self.pump.ended_relays.append((self, how))

    def notify_ended(self, how: RelayEnd) -> None:
        """Tell the owner, and part the objects from each other so that they die without the garbage collector."""
        for flow in (self.from_visitor, self.from_server):
            del flow.reverse, flow.pair
        try:
            self.on_end(self, how)
        except Exception as error:
            log.exception("could not tell the end of a relay", exc_info=error)

    def start_lingering(self) -> None:
        """One side has ended: from now on the relay has `linger` seconds from byte to byte, in whatever direction."""
        if self.lingering:
            return
        self.lingering = True
        self.seen = self.up + self.down
        self.deadline = trio.current_time() + self.linger
        self.pump.timers.watch(self)

    def note_progress(self) -> None:
        """Put the deadline off if bytes have moved since it was set."""
        moved = self.up + self.down
        if moved != self.seen:
            self.seen = moved
            self.deadline = trio.current_time() + self.linger

    def on_deadline(self) -> None:
        """`linger` seconds have passed without a byte."""
        self.end(RelayEnd(Cause.LINGERED))
