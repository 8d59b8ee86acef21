"""The pool of one tcp tunnel: connections parked at the relay, dialled ahead of the visitors that they will serve.

A parked connection is silent and costs a descriptor. When the relay gives it to a visitor, the first bytes on it are a
PROXY header with the visitor's address. Then the pool hands the connection over, positioned behind the header, and
dials another one. There is no task per connection or per visitor: all of this happens in callbacks of the engine.

Middleboxes forget silent connections, and tell neither end. So a parked connection is probed by TCP keepalive, and
after `max_age` another one is dialled in its place; then the relay closes the oldest.

A connection that ends before a header is *trouble*: the tunnel, the relay or the network is gone. The pool then dials
no more until its owner has checked and calls `resume`. Otherwise an agent whose tunnel was closed would dial in a tight
loop. Connections beyond `size` may end without trouble: that is how a pool shrinks. The relay closes them (`trim`),
because only the relay knows which connections have no visitor. So no visitor is lost.

How large the pool should be is computed by pure functions. A visitor that finds a parked connection is served at once;
one that finds none waits a round trip until a new one has been dialled. While connections are being replaced, the
visitors of one round trip need other ones, so the pool holds what arrives in half a second. That suffices for a relay
on the other side of the world, and for bursts.

    it grows      at once, inside the burst            to twice the arrivals of the present window
    it shrinks    by half per review, when quiet       never below what the busiest window since the last one needs
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.agent.defaults import MAX_POOL, MIN_POOL, PARKED_KEEPALIVE, PARKED_MAX_AGE
from tunneld.agent.source import SocketVisitor, SourceEvents, VisitorConnection
from tunneld.engine.engine import Engine, Registration
from tunneld.errors import DIAL_SHORTAGES, RemoteProtocolError, reason_of
from tunneld.net.dial import Address, dial_nowait
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2

ARRIVAL_WINDOW = 0.25
"""Seconds over which arrivals are counted: a long round trip."""
REVIEW_INTERVAL = 15.0
"""Seconds between reviews of whether the pool is too large. Not urgent: parked connections cost next to nothing."""
REPLACED_AT_ONCE = 4
"""At a review, one in this many connections is replaced for its age at most: never all of them in one moment."""
WINDOWS_HELD = 2
"""Windows of arrivals that the pool holds: one is being replaced while the other is used."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The minimum and maximum size of a pool, in connections; 1 <= minimum <= maximum. And for how long a connection is
    silent before the relay is probed, and its age at which it is replaced, both in seconds.
    """

    minimum: int = MIN_POOL
    maximum: int = MAX_POOL
    keepalive: float = PARKED_KEEPALIVE
    max_age: float = PARKED_MAX_AGE

    def clamp(self, size: int) -> int:
        """The nearest size within the limits."""
        return max(self.minimum, min(size, self.maximum))


def needed_size(arrivals: int, limits: PoolLimits) -> int:
    """The size for this many visitors per window."""
    return limits.clamp(WINDOWS_HELD * arrivals)


def grown_size(size: int, arrivals: int, limits: PoolLimits) -> int:
    """The new size when the present window has had `arrivals` so far: never smaller than before."""
    return max(size, needed_size(arrivals, limits))


def shrunk_size(size: int, busiest: int, limits: PoolLimits) -> int:
    """The new size after a review, when the busiest window since the last one had `busiest` visitors: never larger."""
    return min(size, max(needed_size(busiest, limits), size // 2))


class Parked(Protocol):
    """A connection that waits for a visitor at the relay, or is being made. It calls `Pool.on_visitor` or
    `Pool.on_lost` once.
    """

    def check(self) -> None:
        """Look whether a visitor's header or the end has arrived."""

    def close(self) -> None:
        """Close the connection without calling the pool."""


class Pool:
    """The parked connections of one tunnel. Implements `ConnectionSource`."""

    def __init__(
        self, engine: Engine, address: Address, limits: PoolLimits, events: SourceEvents, *, keep_header: bool
    ) -> None:
        """`address` is the tunnel's server side. `keep_header`: leave the PROXY header in front of the visitor's
        bytes.
        """
        self.size = limits.minimum
        self.engine = engine
        self.events = events
        self.keep_header = keep_header
        self._address = address
        self.limits = limits
        self._parked: dict[Parked, float] = {}  # when it was dialled, in `trio.current_time`; oldest first
        self._surplus = 0  # parked connections that the relay was asked to trim
        self._paused = False
        self._emptied = trio.Event()
        self._window_start = -ARRIVAL_WINDOW
        self._arrivals = self._busiest = 0

    @property
    def parked(self) -> int:
        """Connections that wait for a visitor or are being made."""
        return len(self._parked)

    def resume(self) -> None:
        """See `ConnectionSource.resume`."""
        self._paused = False
        while len(self._parked) < self.size and not self._paused:
            self._dial()

    def pause(self) -> None:
        """See `ConnectionSource.pause`: visitors use up the parked connections."""
        self._paused = True

    def resize(self) -> bool:
        """Shrink the pool if it is larger than needed; returns whether there is a surplus for the relay to trim. If
        there is none, dial connections in place of old ones: they are the surplus of the next time.
        """
        self.size = shrunk_size(self.size, self._busiest, self.limits)
        self._busiest = 0
        self._surplus = max(0, len(self._parked) - self.size)
        if not self._surplus:
            self._replace_old()
        return self._surplus > 0

    def probe(self) -> None:
        """Do nothing: a parked connection cannot be asked for an answer. TCP keepalive finds the dead ones."""

    def close(self) -> None:
        """Close everything parked. A visitor whose header has arrived already is still handed over."""
        self._paused = True
        self._surplus = 0
        for parked in list(self._parked):
            parked.check()
            if parked in self._parked:
                self._remove(parked)
                parked.close()

    def withdraw(self) -> None:
        """See `ConnectionSource.withdraw`. A parked connection cannot carry a message; the session has the relay trim
        them.
        """
        self.pause()

    async def wait_withdrawn(self) -> None:
        """Return at once, see `withdraw`."""

    async def wait_closed(self) -> None:
        """See `ConnectionSource.wait_closed`."""
        while self._parked:
            await self._emptied.wait()

    # Called by the connections

    def on_visitor(self, parked: Parked, visitor: VisitorConnection, header: bytes) -> None:
        """A visitor arrived on a parked connection, which now belongs to `visitor`."""
        if parked in self._parked:
            self._remove(parked)
            self._count_arrival()
            self.events.on_visitor(visitor, header)
            if not self._paused:
                self.resume()

    def on_lost(self, parked: Parked, reason: str, *, shortage: bool = False) -> None:
        """A connection ended or could not be made, and is closed; `reason` is a sentence. `shortage`: for want of a
        descriptor or a port of this machine.
        """
        if parked in self._parked:
            self._remove(parked)
            if shortage:
                self._report_shortage(reason)
            elif self._surplus:  # trimmed as asked; visitors since then may have left too few
                self._surplus -= 1
                if not self._paused:
                    self.resume()
            elif len(self._parked) < self.size:
                self._report_trouble(reason)

    # Inside

    def _remove(self, parked: Parked) -> None:
        del self._parked[parked]
        if not self._parked:
            self._emptied.set()
            self._emptied = trio.Event()

    def _start_dial(self) -> Parked:
        """Start to make a connection. Raises `OSError`."""
        return PlainParked(self, dial_nowait(self._address, self.limits.keepalive))

    def _dial(self) -> None:
        try:
            parked = self._start_dial()
        except OSError as error:
            report = self._report_shortage if error.errno in DIAL_SHORTAGES else self._report_trouble
            report(f"could not connect to the relay: {reason_of(error)}")
        else:
            self._parked[parked] = trio.current_time()

    def _replace_old(self) -> None:
        """Dial one connection for each that is older than `max_age`, or for some of them."""
        oldest = trio.current_time() - self.limits.max_age
        old = sum(dialled <= oldest for dialled in self._parked.values())
        for _ in range(min(old, max(1, self.size // REPLACED_AT_ONCE))):
            if not self._paused:
                self._dial()

    def _count_arrival(self) -> None:
        """Count a visitor in the present window, and grow if the pool is too small for that many."""
        now = trio.current_time()
        if now - self._window_start >= ARRIVAL_WINDOW:
            self._window_start, self._arrivals = now, 0
        self._arrivals += 1
        self._busiest = max(self._busiest, self._arrivals)
        self.size = grown_size(self.size, self._arrivals, self.limits)

    def _report_shortage(self, reason: str) -> None:
        """Pause, and report the shortage once until `resume`."""
        if not self._paused:
            self._paused = True
            self.events.on_shortage(reason)

    def _report_trouble(self, reason: str) -> None:
        """Pause, and report the reason once until `resume`."""
        if not self._paused:
            self._paused = True
            self.events.on_trouble(reason)


class PlainParked:
    """A connection without TLS that the engine watches, and the part of its header that has arrived."""

    __slots__ = ("_handle", "_header", "_pool", "_registration", "connection")

    def __init__(self, pool: Pool, connection: socket.socket, handle: Parked | None = None) -> None:
        """`handle` is the pool's key for it, if that is another object. It is dropped after its only use, see
        `TlsParked`.
        """
        self._pool = pool
        self.connection = connection
        self._handle = handle
        self._header = b""
        self._registration: Registration | None = pool.engine.watch(connection, self.check, pool.events.on_failure)

    def check(self) -> None:
        """See `Parked.check`. The engine calls it when the connection is readable."""
        if self._registration is None:
            return
        try:
            header = self._receive_header()
        except BlockingIOError:
            return
        except (EOFError, RemoteProtocolError) as error:
            self._lose(str(error))
        except OSError as error:
            self._lose(reason_of(error))
        else:
            self._pool.on_visitor(self._release(), SocketVisitor(self.connection), header)

    def close(self) -> None:
        """See `Parked.close`."""
        self._release()
        self.connection.close()

    def _receive_header(self) -> bytes:
        """Read the header and not one byte more; with `Pool.keep_header` it is only peeked at.

        Raises `BlockingIOError` while it is incomplete, `EOFError` when the relay closed the connection,
        `RemoteProtocolError`, `OSError`.
        """
        flags = socket.MSG_PEEK if self._pool.keep_header else 0
        while missing := missing_v2(self._header) if self._header else COMMON_V2:
            seen = len(self._header) if flags else 0  # peeking returns these bytes again
            data = self.connection.recv(seen + missing, flags)
            if not data:
                raise EOFError("closed by the relay")
            if len(data) == seen:
                raise BlockingIOError
            self._header = data if flags else self._header + data
        return self._header

    def _lose(self, reason: str) -> None:
        handle = self._release()
        self.connection.close()
        self._pool.on_lost(handle, f"connection to the relay lost: {reason}")

    def _release(self) -> Parked:
        """Stop watching, and return the pool's key for this connection."""
        if self._registration is not None:
            self._registration.release()
            self._registration = None
        handle, self._handle = self._handle, None
        return handle or self
