"""A relay: two ends of any kind, joined by two flows. Everything about how it ends is here, once for all kinds.

    both flows have passed on an end of file   FINISHED   both ends are released
    a side fails                               RESET      the other side is reset, once it has what was sent before
    `linger` seconds without a byte            LINGERED   only after one side has ended
    `drop`, a bug, or the engine stops         DROPPED

**An end of file from one side is passed on** behind its bytes, and the other direction goes on while it makes progress.

**A failed write does not end what that side has still to say.** A server that reads a little of an upload, answers and
closes makes the next write to it fail, with its answer unread in the same socket. So the failing side is read to its
end and its bytes are delivered before the relay ends.

**Whatever is cut is a reset.** A side that has not been told an end of file by the other one is reset when the relay
ends, for whatever reason; a clean end is only ever passed on. A reset discards what its receiver has not acknowledged,
so the relay waits for the acknowledgement of what it has delivered, no longer than `linger` seconds.

The flows only move bytes (`flow`). They report `source_ended`, `source_failed` and `target_failed`, and call
`extend_deadline` when bytes have moved.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import trio

from tunneld.engine.end import End
from tunneld.engine.engine import Cause, Limiter, Relay, RelayEnd, Side
from tunneld.engine.flow import Flow
from tunneld.engine.flows import FLOWS
from tunneld.engine.handover import RelayState
from tunneld.engine.scheduler import Scheduler
from tunneld.engine.socket_end import SocketEnd
from tunneld.errors import reason_of
from tunneld.log import Logger

DELIVERY_CHECK: Final = 0.05
"""Seconds between two looks for acknowledgements before a reset: half of a usual round trip."""

EndsFlow = Flow[End, End]

VISITOR, SERVER = Side.VISITOR, Side.SERVER  # Python 3.11 takes long to look up a member of an enumeration
FINISHED, LINGERED, DROPPED = RelayEnd(Cause.FINISHED), RelayEnd(Cause.LINGERED), RelayEnd(Cause.DROPPED)

log = Logger("engine")


class JoinedEnds:
    """The `Relay` that the owner holds. It ends once; `on_end` is called after the batch of events."""

    __slots__ = (
        "closed", "deadline", "delivering", "engine", "failure", "from_server", "from_visitor", "give_up", "linger",
        "lingering", "moved_before", "on_end", "side_failed", "throttle",
    )  # fmt: skip

    from_visitor: EndsFlow
    from_server: EndsFlow
    deadline: float  # Trio time at which a lingering relay ends
    moved_before: int  # bytes that had moved when the deadline was set
    give_up: float  # Trio time at which waiting for acknowledgements ends

    def __init__(
        self,
        engine: Scheduler,
        visitor: End,
        server: End,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> None:
        """See `Engine.join`. Nothing is attached before `start`."""
        self.engine = engine
        self.linger = linger
        self.on_end = on_end
        self.throttle = throttle
        self.closed = False
        self.lingering = False  # one side has ended
        self.failure: RelayEnd | None = None  # one side is broken; its bytes are still being delivered
        self.side_failed = False  # and none of its bytes is left to read
        self.delivering = False  # all of them are: waiting for their acknowledgement
        flow, reverse = FLOWS[isinstance(visitor, SocketEnd), isinstance(server, SocketEnd)]
        self.from_visitor = up = flow(self, VISITOR, visitor, server)
        self.from_server = down = reverse(self, SERVER, server, visitor)
        up.reverse = down
        down.reverse = up

    def start(self, early: bytes = b"") -> None:
        """Attach both flows; see `Engine.join` for `early`. `on_end` is never called from inside."""
        self.engine.relay_started(self)
        for flow in (self.from_visitor, self.from_server):
            try:
                flow.start()
            except OSError as error:
                self.source_failed(flow, error)
            if self.closed:
                return
        if early:
            self.from_visitor.deliver_first(early)

    # Called by the owner

    @property
    def up(self) -> int:
        """See `Relay.up`."""
        return self.from_visitor.moved

    @property
    def down(self) -> int:
        """See `Relay.down`."""
        return self.from_server.moved

    def drop(self) -> None:
        """See `Relay.drop`."""
        self.close(DROPPED)

    def export(self) -> RelayState | None:
        """Release both sockets without closing them, and return the state of the relay; None if that is not possible.
        `on_end` is not called.
        """
        visitor, server = self.from_visitor, self.from_server
        if self.closed or not isinstance(visitor.source, SocketEnd) or not isinstance(server.source, SocketEnd):
            return None
        self.closed = True
        rest = max(0.0, self.deadline - trio.current_time()) if self.lingering else None
        self.engine.timers.forget(self)
        self.engine.relays.discard(self)
        up, down = visitor.export(), server.export()
        state = RelayState(visitor.source.connection, server.source.connection, up, down, self.linger, rest)
        self._break_cycle()
        return state

    def restore(self, state: RelayState) -> None:
        """Continue from `state`, right after `start`."""
        if self.closed:
            return
        self.from_visitor.restore(state.up)
        self.from_server.restore(state.down)
        if state.rest is not None:
            self.start_lingering()
            self.deadline = trio.current_time() + state.rest
            self.engine.timers.watch(self)

    # Called by the flows

    def source_ended(self, flow: EndsFlow) -> None:
        """The end of file of a flow's source was read, and all bytes before it are delivered."""
        if self.failure is not None and self.failure.consumed_reset_of(flow.side):
            self.close_after_delivery()
            return
        flow.eof_received = True
        if not self.lingering:
            self.start_lingering()
        self.pass_eof(flow)

    def pass_eof(self, flow: EndsFlow) -> None:
        """Pass an end of file on, or set the flow `blocked` if its target is still connecting."""
        if flow.eof_sent or flow.stopped:
            return
        if flow.reverse.eof_sent and self.failure is None:  # both directions are over: releasing the ends says so
            flow.eof_sent = True
            self.close(FINISHED)
            return
        try:
            if flow.moved:
                flow.target.finish()
            elif not flow.target.finish_when_connected():
                flow.blocked = True
                return
        except OSError as error:
            self.target_failed(flow, error)
            return
        flow.eof_sent = True
        if self.failure is not None:
            self.close_after_delivery()

    def source_failed(self, flow: EndsFlow, error: OSError) -> None:
        """The source of a flow is broken, and all of its bytes have been read: end the relay once they are delivered,
        and reset the other side.
        """
        if self.closed:
            return
        if self.failure is not None and flow.stopped:  # the other side takes no more
            self.close(self.failure)
            return
        self.side_failed = True
        if self.failure is None:
            self.failure = RelayEnd(Cause.RESET, flow.side, error)
        flow.reverse.stop()
        if flow.undelivered:
            self.start_lingering()
        else:
            self.close_after_delivery()

    def target_failed(self, flow: EndsFlow, error: OSError) -> None:
        """The target of a flow takes no more bytes. Deliver those that it has sent, then end the relay."""
        out = flow.reverse
        if self.closed:
            return
        if self.failure is not None or (out.eof_received and not out.eof_sent):  # neither side takes any
            self.side_failed = True
            self.close(self.failure or RelayEnd(Cause.RESET, out.side, error))
            return
        self.failure = RelayEnd(Cause.RESET, out.side, error)
        flow.stop()
        if out.eof_sent:
            self.close_after_delivery()
            return
        self.start_lingering()
        if not out.blocked:
            out.move_soon()

    def extend_deadline(self) -> None:
        """Move the deadline of a lingering relay back if bytes have moved since it was set."""
        if self.delivering:  # nothing was set
            return
        moved = self.from_visitor.moved + self.from_server.moved
        if moved != self.moved_before:
            self.moved_before = moved
            self.deadline = self.engine.now() + self.linger

    def on_failure(self, error: Exception) -> None:
        """A bug while serving this relay: drop the relay and nothing else."""
        log.error("relay failed: internal error", exc_info=error)
        self.close(DROPPED)

    # Called by the engine

    def on_vanished(self, flow: EndsFlow, seconds: float) -> None:
        """The source of `flow` has acknowledged nothing for this long: its peer or the network to it is gone."""
        self.source_failed(flow, TimeoutError(errno.ETIMEDOUT, f"nothing was acknowledged for {seconds:g} s"))

    def on_stop(self) -> None:
        """The engine stops."""
        self.close(DROPPED)

    def on_deadline(self) -> None:
        """No byte has moved for `linger` seconds, or it is time to look for acknowledgements again."""
        if self.delivering:
            self.close_after_delivery()
        else:
            self.close(self.failure or LINGERED)

    def notify_ended(self, how: RelayEnd) -> None:
        """Call `on_end`. Break the reference cycle first, so that memory is freed without the garbage collector."""
        self._break_cycle()
        try:
            self.on_end(self, how)
        except Exception as error:
            log.exception("on_end callback failed: internal error", exc_info=error)

    # Ending

    def start_lingering(self) -> None:
        """One side has ended: from now on the relay ends after `linger` seconds without a byte in either direction."""
        if not self.lingering:
            self.lingering = True
            self.moved_before = self.from_visitor.moved + self.from_server.moved
            self.deadline = self.engine.now() + self.linger
            self.engine.timers.watch(self)

    def close_after_delivery(self) -> None:
        """Close because of `failure`, once the side that has not failed has acknowledged all bytes, or `linger` seconds
        have passed. Nothing is read any more.
        """
        assert self.failure is not None
        if self.closed:
            return
        self.from_visitor.stopped = self.from_server.stopped = True
        receiver = (self.from_visitor if self.failure.side is VISITOR else self.from_server).target
        if not receiver.unacknowledged():
            self.close(self.failure)
            return
        now = self.engine.now()
        if not self.delivering:
            self.delivering = self.lingering = True
            self.give_up = now + self.linger
        if now >= self.give_up:
            self.close(self.failure)
            return
        self.deadline = now + DELIVERY_CHECK
        self.engine.timers.watch(self)

    def close(self, how: RelayEnd) -> None:
        """End both sides now, and have `on_end` called after the batch. May be called again."""
        if self.closed:
            return
        self.closed = True
        if self.lingering:
            self.lingering = False
            self.engine.timers.forget(self)
        is_finished = how is FINISHED
        visitor, server = self.from_visitor, self.from_server
        visitor.detach()
        server.detach()
        if is_finished:
            visitor.source.release()
            server.source.release()
        else:
            self._cut(visitor, how)
            self._cut(server, how)
        if not is_finished or self.throttle is not None:
            visitor.discard()
            server.discard()
        self.engine.relay_ended(self, how)

    def _cut(self, flow: EndsFlow, how: RelayEnd) -> None:
        """End the source of a flow, with a reset unless it was told the end of the bytes for it: it must not take a
        part for the whole.
        """
        end, inward = flow.source, flow.reverse
        if self.side_failed or not inward.eof_sent or inward.undelivered:
            end.reset(reason_of(how.error) if how.error else how.cause.value)
        else:
            end.close(how.cause.value)

    def _break_cycle(self) -> None:
        visitor, server = self.from_visitor, self.from_server
        del visitor.reverse, visitor.relay, server.reverse, server.relay
