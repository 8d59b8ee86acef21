"""One direction of a relay. A flow moves bytes, and knows nothing of how a relay ends.

A flow is in one of four states, and only a system call, or a call of an end, moves it from one to another:

    drained    the source had no more bytes; the flow waits for new ones
    blocked    the target took no more; nothing more is read, and the flow waits until the target is writable
    ended      the source's end of file was read (`eof_received`); once everything is delivered it is passed on
               (`eof_sent`)
    preempted  the flow used up its quantum; it is served again behind everything else that is ready

A blocked flow does not read, so the sender behind its source stops: by TCP's window, or by a channel's credit. That is
all the flow control there is.

A flow handles all events of its source, also those that concern the other direction: that the source is writable again
is passed to the `reverse` flow, whose target it is.

Which class moves the bytes depends on both ends, see `flows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar, cast

from tunneld.engine.end import End
from tunneld.engine.engine import Side
from tunneld.engine.handover import FlowState
from tunneld.engine.throttle import Allowance, Throttle

if TYPE_CHECKING:
    from tunneld.engine.relay import JoinedEnds
    from tunneld.engine.vanished import SilentPeer


Source_co = TypeVar("Source_co", bound=End, covariant=True)
Target_co = TypeVar("Target_co", bound=End, covariant=True)


class Flow(Generic[Source_co, Target_co]):
    """The bytes from `source`, which is the relay's `side`, to `target`."""

    __slots__ = (
        "allowance", "blocked", "eof_received", "eof_sent", "looked_at", "moved", "relay", "reverse", "side", "silent",
        "source", "stopped", "target",
    )  # fmt: skip

    __deletable__ = ("relay", "reverse")  # `notify_ended` breaks the reference cycle; mypyc wants to be told

    relay: JoinedEnds
    reverse: Flow[End, End]  # set by the relay

    def __init__(self, relay: JoinedEnds, side: Side, source: Source_co, target: Target_co) -> None:
        self.relay = relay
        self.side = side
        self.source = source
        self.target = target
        self.moved = 0  # bytes delivered to the target
        self.blocked = self.eof_received = self.eof_sent = False
        self.stopped = False  # the target takes no more bytes, ever: the source is not read
        self.looked_at = 0  # bytes moved when the target's peer was last looked at, see `vanished`
        self.silent: SilentPeer | None = None  # what was seen then, if bytes for the target are outstanding
        self.allowance: Allowance | None = None
        if relay.throttle is not None:
            self.allowance = Allowance(cast(Throttle, relay.throttle), self.move_soon)

    def start(self) -> None:
        """Become the handler of the source. Raises OSError if that is broken."""
        raise NotImplementedError

    def deliver_first(self, data: bytes) -> None:
        """Deliver `data`, read from the source already, before all that follows. Called right after `start`."""
        raise NotImplementedError

    def detach(self) -> None:
        """Handle the source no longer."""
        raise NotImplementedError

    @property
    def undelivered(self) -> bool:
        """Whether bytes were read and not delivered."""
        raise NotImplementedError

    def resume(self) -> None:
        """The target takes bytes again: deliver what was read, or the end of file, and read on."""
        raise NotImplementedError

    def move_soon(self) -> None:
        """Serve this flow again, behind everything else that is ready."""
        raise NotImplementedError

    def on_turn(self) -> None:
        """It is served again, see `Scheduler.serve_soon`."""
        self.resume()

    def stop(self) -> None:
        """The target takes no more bytes: read no more, and discard what was read for it."""
        self.stopped = True
        self.blocked = False
        self.discard()

    def discard(self) -> None:
        """Forget undelivered bytes and return the unused tokens."""
        if self.allowance is not None:
            self.allowance.close()

    def on_failure(self, error: Exception) -> None:
        """A bug while serving this flow, see `JoinedEnds.on_failure`."""
        self.relay.on_failure(error)

    def on_stop(self) -> None:
        """The engine stops."""
        self.relay.on_stop()

    def export(self) -> FlowState:
        """Release the source without closing it, and return the state of this direction. Only between two sockets."""
        raise NotImplementedError

    def restore(self, state: FlowState) -> None:
        """Continue from `state`, right after `start`."""
        raise NotImplementedError
