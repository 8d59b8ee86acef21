"""The pool: connections parked at the relay, dialled ahead of the visitors that they will serve.

    size      how many are wanted (sizing.py)         grows at once, shrinks in reviews
    parked    how many are out there, or on their way

A parked connection says nothing and costs a descriptor. When the relay gives it to a visitor, the first that comes is
a PROXY header with the visitor's address; then the pool hands the connection over, positioned behind the header, and
dials another one. There is no task here, neither per connection nor per visitor: everything happens in callbacks of
the engine.

A connection that ends without a header is *trouble*: the tunnel is gone, or the relay, or the network. The pool then
dials no more until its owner has looked and says `resume`. Otherwise an agent whose tunnel was closed would dial in a
tight loop. Connections beyond `size` may end: that is how a pool shrinks. Shrinking is left to the relay (`trim`),
since only the relay knows which connections no visitor got: so no visitor is lost by it.

How many connections to keep parked at the relay. Pure.

A visitor who finds a parked connection is served at once; one who finds none waits a round trip until a new one has
been dialled. While connections are being replaced the visitors of one round trip must find others, so the pool holds
what arrives in half a second: enough for a relay on the other side of the world, and for bursts.

    it grows      at once, inside the burst           whatever arrived in this window wants twice as many
    it shrinks    by half per review, when quiet      never below what the busiest window since the last review wants
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.agent.source import SocketVisitor, SourceEvents, VisitorConnection
from tunneld.engine.engine import Engine, Registration
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.net.dial import Address, dial_nowait
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2

WINDOW = 0.25
"""Seconds over which arrivals are counted: a long round trip."""
RESIZE_INTERVAL = 15.0
"""Seconds between looks at whether the pool is larger than it needs to be; parked connections cost next to nothing."""
AHEAD = 2
"""Windows of arrivals that the pool holds: one is being replaced while the other is used."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The pool's least and most, in connections; 1 <= least <= most."""

    least: int = 8
    most: int = 200

    def clamp(self, size: int) -> int:
        """The nearest size that is allowed."""
        return max(self.least, min(size, self.most))


def wanted(arrivals: int, limits: PoolLimits) -> int:
    """The size that so many visitors in one window want."""
    return limits.clamp(AHEAD * arrivals)


def grown(size: int, arrivals: int, limits: PoolLimits) -> int:
    """The size from now on, when the window has seen `arrivals` so far: never less than before."""
    return max(size, wanted(arrivals, limits))


def shrunk(size: int, busiest: int, limits: PoolLimits) -> int:
    """The size after a review, when the busiest window since the last one saw `busiest` visitors: never more."""
    return min(size, max(wanted(busiest, limits), size // 2))


class Parked(Protocol):
    """A connection that waits for a visitor, or is on its way to do so. It tells its pool when either is over."""

    def look(self) -> None:
        """Has a visitor come, or the end?"""

    def close(self) -> None:
        """Let go of it, told nobody."""


class Pool:
    """The parked connections of one tunnel. See `Supply`."""

    description = "parked connections"

    def __init__(
        self, engine: Engine, address: Address, limits: PoolLimits, owner: SourceEvents, *, keep_header: bool
    ) -> None:
        """`address` is the tunnel's server side. `keep_header`: leave it in front of the visitor's bytes."""
        self.size = limits.least
        self.engine = engine
        self.owner = owner
        self.flags = socket.MSG_PEEK if keep_header else 0  # of reading a header
        self._address = address
        self._limits = limits
        self._parked: dict[Parked, None] = {}  # in the order in which they were dialled
        self._surplus = 0  # of those parked, as many as the relay has been asked to trim
        self._resting = False
        self._emptied = trio.Event()
        self._window_began = -WINDOW
        self._arrivals = self._busiest = 0

    @property
    def parked(self) -> int:
        """Connections that wait for a visitor, or are on their way to do so."""
        return len(self._parked)

    def resume(self) -> None:
        """Dial what lacks, now and whenever a visitor takes one, until there is trouble or somebody calls `rest`."""
        self._resting = False
        while len(self._parked) < self.size and not self._resting:
            self._dial()

    def pause(self) -> None:
        """Dial nothing until `resume`; visitors that come use up what is parked."""
        self._resting = True

    def resize(self) -> bool:
        """Shrink the pool if it is larger than it needs to be; tells whether there is a surplus to trim."""
        self.size = shrunk(self.size, self._busiest, self._limits)
        self._busiest = 0
        self._surplus = max(0, len(self._parked) - self.size)
        return self._surplus > 0

    def probe(self) -> None:
        """Parked connections cannot be asked; what the kernel does not end, the relay's visitors find out."""

    def close(self) -> None:
        """Let go of everything parked. A visitor whose header has arrived already is still handed over."""
        self._resting = True
        self._surplus = 0
        for parked in list(self._parked):
            parked.look()
            if parked in self._parked:
                self._forget(parked)
                parked.close()

    # What its connections report

    def came(self, parked: Parked, way: VisitorConnection, header: bytes) -> None:
        """A visitor is here; the connection is its own from now on."""
        if parked in self._parked:
            self._forget(parked)
            self._count()
            self.owner.on_visitor(way, header)
            if not self._resting:
                self.resume()

    def lost(self, parked: Parked, reason: str) -> None:
        """The connection has ended, or could not be made; it is closed already."""
        if parked in self._parked:
            self._forget(parked)
            if self._surplus:  # trimmed, as we asked; since then visitors may have made it too few
                self._surplus -= 1
                if not self._resting:
                    self.resume()
            elif len(self._parked) < self.size:
                self._in_trouble(reason)

    # Inside

    def _forget(self, parked: Parked) -> None:
        del self._parked[parked]
        if not self._parked:
            self._emptied.set()
            self._emptied = trio.Event()

    def _begin(self) -> Parked:
        """Begin to dial. Raises OSError."""
        return PlainParked(self, dial_nowait(self._address))

    def withdraw(self) -> None:
        """See `Supply.withdraw`: nothing can be said on a parked connection; the relay is asked to trim them."""
        self.pause()

    async def wait_withdrawn(self) -> None:
        """See `Supply.wait_withdrawn`."""

    async def wait_closed(self) -> None:
        """See `Supply.wait_gone`."""
        while self._parked:
            await self._emptied.wait()

    def _dial(self) -> None:
        try:
            parked = self._begin()
        except OSError as error:
            self._in_trouble(reason_of(error))
        else:
            self._parked[parked] = None

    def _count(self) -> None:
        """One more visitor in this window; does the pool want to be larger?"""
        now = trio.current_time()
        if now - self._window_began >= WINDOW:
            self._window_began, self._arrivals = now, 0
        self._arrivals += 1
        self._busiest = max(self._busiest, self._arrivals)
        self.size = grown(self.size, self._arrivals, self._limits)

    def _in_trouble(self, reason: str) -> None:
        """Told once: whoever rests already knows."""
        if not self._resting:
            self._resting = True
            self.owner.on_trouble(reason)


class PlainParked:
    """One connection that the engine watches, and what has come of its header."""

    __slots__ = ("_handle", "_pool", "connection", "head", "watching")

    def __init__(self, pool: Pool, connection: socket.socket, handle: Parked | None = None) -> None:
        """`handle` is what the pool knows it by, where that is not this; named once, and then let go of."""
        self._pool = pool
        self.connection = connection
        self._handle = handle
        self.head = b""
        self.watching: Registration | None = pool.engine.watch(connection, self.look, pool.owner.on_failure)

    def look(self) -> None:
        """See `Parked`."""
        if self.watching is None:
            return
        try:
            whole = self.receive()
        except BlockingIOError:
            return
        except (EOFError, RemoteProtocolError) as error:
            self._lose(str(error))
        except OSError as error:
            self._lose(reason_of(error))
        else:
            self._pool.came(self._release(), SocketVisitor(self._pool.engine, self.connection), whole)

    def close(self) -> None:
        """See `Parked`."""
        self._release()
        self.connection.close()

    def receive(self) -> bytes:
        """The header, once it is whole, and not an octet more; it may stay where it is (`Pool.flags`).

        Raises `BlockingIOError` while it is not, `EOFError` when the relay closed, `RemoteProtocolError`, `OSError`.
        """
        flags = self._pool.flags
        while missing := missing_v2(self.head) if self.head else COMMON_V2:
            held = len(self.head) if flags else 0  # peeking shows again what has been seen
            data = self.connection.recv(held + missing, flags)
            if not data:
                raise EOFError("connection closed by the relay")
            if len(data) == held:
                raise BlockingIOError
            self.head = data if flags else self.head + data
        return self.head

    def _lose(self, reason: str) -> None:
        handle = self._release()
        self.connection.close()
        self._pool.lost(handle, reason)

    def _release(self) -> Parked:
        """Watch no more; what the pool knows it by. Parted from that, both die without the garbage collector."""
        if self.watching is not None:
            self.watching.release()
            self.watching = None
        handle, self._handle = self._handle, None
        return handle or self
