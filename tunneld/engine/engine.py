"""What the rest of the program asks of the data plane: one contract, two engines.

An engine moves all bytes between plain sockets of a process. On Linux it is the pump (`pump.py`, one task over one
epoll set), elsewhere the portable engine (`portable.py`, Trio tasks). Nobody above this floor knows which one runs.

Every method is synchronous, so that a visitor can be accepted, paired and relayed without a task of its own;
callbacks run inside the engine's task and must not block. An exception out of a callback goes to the owner's
`on_failure` and never ends the engine.

    watch(socket)   -> the owner looks at a parked connection when something happened on it
    listen(socket)  -> connections in batches
    join(a, b)      -> a relay: bytes flow both ways until both directions ended
    limit(...)      -> what relays may have together

The sockets are `socket.socket` objects in non-blocking mode. From `join` on the engine owns both and closes them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import trio

from tunneld.engine.handover import RelayState
from tunneld.errors import reason_of

FailureCallback = Callable[[Exception], None]
"""Called when a callback of this owner raised: a bug. The owner is expected to die of it, alone."""


class Cause(Enum):
    """Why a relay ended."""

    FINISHED = "finished"
    "Both directions reached their end and everything was delivered."
    RESET = "reset"
    "One side broke: a reset, a refused or timed-out connect, a vanished network. `side` and `error` say which and how."
    LINGERED = "lingered"
    "One side had ended and no byte moved, in either direction, for `linger` seconds."
    DROPPED = "dropped"
    "Its owner dropped it."


class Side(Enum):
    """The two ends of a relay, as seen from the middle."""

    VISITOR = "visitor"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """How a relay ended; `side` and `error` are set where `cause` is RESET."""

    cause: Cause
    side: Side | None = None
    error: OSError | None = None

    def __str__(self) -> str:
        """The same in words, for logs and events."""
        match self.cause:
            case Cause.FINISHED:
                return "both sides finished"
            case Cause.LINGERED:
                return "one side had finished and the other was silent (linger)"
            case Cause.DROPPED:
                return "dropped"
            case Cause.RESET:
                side = f"the {self.side.value}" if self.side else "one side"
                return f"{side} broke off: {reason_of(self.error)}" if self.error else f"{side} broke off"


class Relay(Protocol):
    """Two sockets joined."""

    @property
    def up(self) -> int:
        """Bytes delivered from the visitor to the server."""

    @property
    def down(self) -> int:
        """Bytes delivered from the server to the visitor."""

    def drop(self) -> None:
        """Close both connections now; bytes in flight are lost. `on_end` is told DROPPED. Harmless on an ended
        relay.
        """


class Limiter(Protocol):
    """What the relays of one tunnel share: a rate and a quota. Made by an engine, for that engine."""

    @property
    def left(self) -> int | None:
        """Octets of the quota that are left; None: there is none."""


class Registration(Protocol):
    """A socket the engine looks after for somebody."""

    def release(self) -> None:
        """Forget the socket, and do not close it. No callback comes after this. Harmless when repeated."""


class Engine(Protocol):
    """The data plane of one process. All of it needs `run` to be running."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every relay is dropped and every registration released."""

    def listen(
        self, listener: socket.socket, on_connection: Callable[[socket.socket, Any], None], on_failure: FailureCallback
    ) -> Registration:
        """Accept from `listener` and hand each connection (non-blocking, close-on-exec) and its peer address to
        `on_connection`.

        Out of descriptors or socket memory: the acceptor logs it once, waits `accept_backoff` seconds and goes on;
        nothing spins.
        """

    def watch(
        self, connection: socket.socket, on_event: Callable[[], None], on_failure: FailureCallback
    ) -> Registration:
        """Call `on_event` when `connection` becomes readable, its peer closes or it breaks; the owner looks by itself.

        Calls may be spurious. At least one comes when the first byte arrives or the connection (being dialled, too)
        ends; the pump calls again at every later edge, also where unread bytes stand before an end.
        """

    def join(
        self,
        visitor: socket.socket,
        server: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """Relay between the two until both directions ended, then close both and call `on_end` once, never from
        inside `join`.

        `linger` is in seconds; `throttle` is one of this engine's, see `limit`. Either socket may still be connecting
        (EINPROGRESS): bytes wait for it, and a refused connect ends the relay with RESET on that side. An end of file
        from one side is forwarded as one (`shutdown`), the other direction goes on; a reset from one side is a reset
        to the other; bytes accepted from one side are delivered before its end is.
        """

    def export_relay(self, relay: Relay) -> RelayState | None:
        """Take a relay out of this engine as it is, without closing anything, for `put_down`; `on_end` is not told.

        None where that cannot be, or where it has ended: then nothing has changed.
        """

    def import_relay(
        self, lifted: RelayState, *, on_end: Callable[[Relay, RelayEnd], None], throttle: Limiter | None = None
    ) -> Relay:
        """Go on with a relay that was lifted, perhaps out of another process' engine; for the rest see `join`."""

    def limit(self, rate: float | None, quota: int | None, on_used_up: Callable[[], None]) -> Limiter:
        """A rate in octets per second, and a quota in octets, that relays share: both directions together, fairly.

        `on_used_up` is called when somebody wants more than the quota, perhaps more than once. Either may be None.
        """
