"""The parked connections of one tcp tunnel, and which of them a visitor gets.

The newest connection comes first: it is the least likely to have been forgotten by a NAT or a firewall in between,
which tells neither end. Agents that share a tunnel take turns by their addresses, whatever the sizes of their pools. Of
one address the oldest comes first then: several agents may be behind it, and the newest connection is always that of
the agent that has just been served.

The kernel probes a parked connection after `interval` seconds of silence. A visitor never gets a connection that has
been silent for `SILENT_INTERVALS` of that, so it has left several probes unanswered. Where no other connection is
parked, all are *checked*: the kernel probes them once a second, the visitor waits, and those that answer serve visitors
again. The kernel drops the rest after a few seconds, and the hidden server makes new ones, which serve the visitor if
they come first.

    add ──► parked ──take──► a visitor's
              │  ▲
      silent  ▼  │ heard
            checked ──dropped by the kernel──► gone
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from typing import Protocol

import trio

from tunneld.engine.engine import FailureCallback, Registration
from tunneld.net.endpoint import Peer
from tunneld.tunnel.server_side import ServerConnection

SILENT_INTERVALS = 1.5
"""Intervals between two probes after which a connection counts as silent. The kernel repeats an unanswered probe after
a quarter of the interval: three are lost by then.
"""
FIRST_LOOK = 0.005
"""Seconds from a probe until the first look for its answer; each later one takes twice as long, up to `LAST_LOOK`."""
LAST_LOOK = 0.25
"""Seconds between looks: a quarter of the time between two probes."""


class ParkableConnection(ServerConnection, Protocol):
    """A connection of the hidden server that can be parked."""

    @property
    def peer(self) -> Peer:
        """The address of the hidden server."""

    def watch(self, on_closed: Callable[[], None], on_failure: FailureCallback, /) -> Registration:
        """Call `on_closed`, perhaps more than once, when the connection is of no use to a visitor any more.
        `on_failure` receives an exception of `on_closed`.
        """

    def heard_ago(self) -> float:
        """Seconds since the peer's last sign of life, see `net.liveness`. Infinite where `on_closed` is due."""

    def probe(self) -> None:
        """Have the kernel ask the peer for a sign of life, and go on asking."""

    def set_keepalive(self, seconds: float) -> None:
        """Have the kernel ask after this long without a sign of life."""


class ParkedConnections:
    """The parked connections of one tunnel. `len` is their number, those that are checked included."""

    def __init__(
        self,
        interval: float,
        on_closed: Callable[[ParkableConnection], None],
        on_heard: Callable[[], None],
        on_failure: FailureCallback,
        *,
        shared: bool = False,
    ) -> None:
        """`interval` is in seconds, see above. `on_closed` is called with a connection that has ended and is closed
        already, `on_heard` when a check has found a connection that can be taken, `on_failure` with bugs. `shared`: the
        tunnel may have several agents.
        """
        self._interval = interval
        self._silence = interval * SILENT_INTERVALS
        self._shared = shared
        self._on_closed = on_closed
        self._on_heard = on_heard
        self._on_failure = on_failure
        self._watches = OrderedDict[ParkableConnection, Registration]()  # oldest first
        self._by_host = OrderedDict[str, OrderedDict[ParkableConnection, None]]()  # whose turn is next; oldest first
        self._checked: dict[ParkableConnection, float] = {}  # when the check began, a reading of time.monotonic
        self._check_wanted = trio.Event()

    def __len__(self) -> int:
        return len(self._watches)

    def __iter__(self) -> Iterator[ParkableConnection]:
        """All of them, oldest first."""
        return iter(self._watches)

    def add(self, connection: ParkableConnection) -> None:
        """Park a connection."""
        self._watches[connection] = connection.watch(lambda: self._on_ended(connection), self._on_failure)
        self._by_host.setdefault(_host(connection), OrderedDict())[connection] = None

    def take(self) -> ParkableConnection | None:
        """Unpark the best connection, which the caller then owns. None where there is none, or a check has to find out
        first which of them still work.
        """
        for host, connections in list(self._by_host.items()):
            for connection in connections if self._shared else reversed(connections):
                if connection not in self._checked and connection.heard_ago() <= self._silence:
                    self._by_host.move_to_end(host)
                    self._remove(connection)
                    return connection
        if len(self._checked) < len(self._watches):
            self._check_wanted.set()
        return None

    def trim(self, keep: int, spared: Container[str] = ()) -> int:
        """See `ServerSide.trim`. Closes the connections that have been parked longest."""
        parked = [connection for connection in self._watches if _host(connection) not in spared]
        surplus = parked[: max(0, len(parked) - keep)]
        for connection in surplus:
            self._remove(connection)
            connection.close()
        return len(surplus)

    def take_all(self) -> list[ParkableConnection]:
        """Unpark all, oldest first. The caller then owns them."""
        taken = list(self._watches)
        for connection in taken:
            if connection in self._checked:
                connection.set_keepalive(self._interval)
            self._remove(connection)
        return taken

    async def check(self) -> None:
        """Check connections whenever `take` finds none that has been heard. Runs until cancelled."""
        while True:
            await self._check_wanted.wait()
            self._check_wanted = trio.Event()
            self._begin()
            delay = FIRST_LOOK
            while self._checked:
                await trio.sleep(delay)
                delay = min(2 * delay, LAST_LOOK)
                if self._check_wanted.is_set():  # connections that have fallen silent since
                    self._check_wanted = trio.Event()
                    self._begin()
                self._look()

    def _begin(self) -> None:
        now = time.monotonic()
        for connection in self._watches:
            if connection not in self._checked:
                self._checked[connection] = now
                connection.probe()

    def _look(self) -> None:
        """Return the connections that have been heard since their check began to the parked ones."""
        now = time.monotonic()
        heard = [connection for connection, began in self._checked.items() if connection.heard_ago() < now - began]
        for connection in heard:
            del self._checked[connection]
            connection.set_keepalive(self._interval)
        if heard:
            self._on_heard()

    def _remove(self, connection: ParkableConnection) -> None:
        self._watches.pop(connection).release()
        self._checked.pop(connection, None)
        host = _host(connection)
        connections = self._by_host[host]
        del connections[connection]
        if not connections:
            del self._by_host[host]

    def _on_ended(self, connection: ParkableConnection) -> None:
        """The hidden server, or the kernel, ended a parked connection."""
        if connection in self._watches:
            self._remove(connection)
            connection.close()
            self._on_closed(connection)


def _host(connection: ParkableConnection) -> str:
    return connection.peer[0]
