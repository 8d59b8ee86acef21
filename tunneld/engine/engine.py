"""The contract of the data plane. Two engines keep it.

An engine moves all bytes between the sockets of a process. On Linux it is the pump (`pump.py`, one task over one epoll
set), elsewhere the portable engine (`portable.py`, Trio tasks). No package above this one depends on which of them
runs.

Every method is synchronous, so that a visitor is accepted, paired and relayed without a task of its own. Callbacks run
in the engine's task and must not block. An exception of a callback is passed to the owner's `on_failure` and never ends
the engine.

    listen(socket)  accept connections in batches
    watch(socket)   report activity on a parked connection, without reading from it
    join(a, b)      relay bytes both ways between two ends of any kind, until both directions have ended
    limit(...)      a bandwidth and a quota that relays share

Sockets are `socket.socket` objects in non-blocking mode. From `join` on, the engine owns both ends and closes them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import trio

from tunneld.engine.handover import RelayState
from tunneld.errors import reason_of

if TYPE_CHECKING:
    from tunneld.engine.end import End
    from tunneld.engine.throttle import TokenBucket

FailureCallback = Callable[[Exception], None]
"""Called when another callback of the same owner has raised: a bug. The owner should close itself and nothing else."""


class Cause(Enum):
    """Why a relay ended."""

    FINISHED = "finished"
    "Both directions reached end of file, and everything was delivered."
    RESET = "reset"
    "One side failed: a reset, a refused or timed-out connect, a lost network. `side` and `error` say which and how."
    LINGERED = "lingered"
    "One side had ended, and no byte moved in either direction for `linger` seconds."
    DROPPED = "dropped"
    "The owner dropped it, the engine stopped, or the engine had a bug."


class Side(Enum):
    """The two sides of a relay."""

    VISITOR = "visitor"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """How a relay ended; `side` and `error` are set if `cause` is RESET."""

    cause: Cause
    side: Side | None = None
    error: OSError | None = None

    def consumed_reset_of(self, side: Side) -> bool:
        """Whether the failed write to `side` has consumed the error that reading from the same socket would report: an
        end of file read there is none. After EPIPE it is one: the kernel reports that if an end of file came before a
        reset.
        """
        return self.side is side and (self.error is None or self.error.errno != errno.EPIPE)

    def __str__(self) -> str:
        """The same in words, for logs and events."""
        match self.cause:
            case Cause.FINISHED:
                return "both sides finished"
            case Cause.LINGERED:
                return "one side had finished and no data followed (linger)"
            case Cause.DROPPED:
                return "dropped"
            case Cause.RESET:
                failed = f"connection to the {self.side.value} failed" if self.side else "connection failed"
                return f"{failed}: {reason_of(self.error)}" if self.error else failed


class Relay(Protocol):
    """Two ends joined by an engine. Its owner holds it until `on_end` is called."""

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""

    def drop(self) -> None:
        """Close both connections now; undelivered bytes are lost. `on_end` is called with DROPPED. Does nothing on an
        ended relay.
        """


class Limiter(Protocol):
    """A bandwidth and a quota that the relays of one tunnel share. It belongs to the engine that made it."""

    @property
    def left(self) -> int | None:
        """Bytes left of the quota, or None if there is no quota."""

    def change(self, rate: float | None, left: int | None) -> None:
        """Have another rate, and so many bytes left of the quota, from now on. None means no such limit."""


class Registration(Protocol):
    """A socket that an engine watches or accepts from; the caller still owns the socket."""

    def release(self) -> None:
        """Stop watching the socket; do not close it. No callback follows. May be called again."""


class Engine(Protocol):
    """The data plane of one process. All methods except `run` require that `run` is running."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then drop every relay and release every registration."""

    def listen(
        self, listener: socket.socket, on_connection: Callable[[socket.socket, Any], None], on_failure: FailureCallback
    ) -> Registration:
        """Accept from `listener`; call `on_connection` with each connection and the peer's address.

        The callback owns the connection, which is non-blocking and close-on-exec. Without descriptors or socket memory
        the acceptor logs it once and tries again every `accept_backoff` seconds; clients wait in the listener's queue.
        """

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """Call `on_event` when `connection` becomes readable, or its peer closes or resets it. Nothing is read.

        Calls may be spurious. There is at least one when the first byte arrives or the connection ends, which includes
        a refused connect. The pump calls again for each later event, such as an end of file behind unread bytes; the
        portable engine does not.
        """

    def join(
        self,
        visitor: socket.socket | End,
        server: socket.socket | End,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
        early: bytes = b"",
    ) -> Relay:
        """Relay between two ends of any kind until both directions have ended, then close both and call `on_end`.

        `on_end` is called once, never from inside `join`. `linger` is in seconds: once one side has ended, the relay
        ends after this long without a byte. `throttle` was made by this engine's `limit`. `early` was read from the
        visitor already, and is delivered before everything else; some 10 KiB at most, since no capacity limits it.

        A socket is an end by itself. It may still be connecting (EINPROGRESS): bytes wait for it, and a refused connect
        ends the relay with RESET on that side. An end of file from one side is forwarded (`shutdown`) and the other
        direction goes on. A reset from one side resets the other. Bytes read from one side are delivered before its end
        of file.
        """

    def set_unacknowledged_timeout(self, seconds: float) -> None:
        """End the relays of peers that have not answered for this long although bytes are outstanding, see `vanished`.
        0: never. Affects present relays, too.
        """

    def export_relay(self, relay: Relay) -> RelayState | None:
        """Take a running relay out of this engine without closing its sockets, for `import_relay`.

        The caller owns the sockets afterwards; `on_end` is not called. Returns None, and changes nothing, if the relay
        has ended or the engine cannot export it.
        """

    def import_relay(
        self, state: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """Continue an exported relay, perhaps of another process. The engine owns the sockets; see also `join`."""

    def limit(
        self,
        rate: float | None,
        quota: int | None,
        on_used_up: Callable[[], None],
        shared: TokenBucket | None = None,
    ) -> Limiter:
        """Make a limiter of `rate` bytes per second and `quota` bytes, both directions of all its relays together.
        `shared` limits them together with the relays of other limiters.

        Relays share the rate fairly. `on_used_up` is called when a relay wants more than the quota, perhaps more than
        once. None means no such limit.
        """
