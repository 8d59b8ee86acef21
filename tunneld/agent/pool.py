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
"""

from __future__ import annotations

import socket

import trio

from tunneld.agent.dial import Address, dial_nowait
from tunneld.agent.sizing import WINDOW, Limits, grown, shrunk
from tunneld.agent.supply import Owner
from tunneld.agent.ways import SocketWay
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.relay.engine import Engine, Registration
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2


class Pool:
    """The parked connections of one tunnel. See `Supply`."""

    what = "parked connections"

    def __init__(self, engine: Engine, address: Address, limits: Limits, owner: Owner, *, keep_header: bool) -> None:
        """`address` is the tunnel's server side. `keep_header`: leave it in front of the visitor's bytes."""
        self.size = limits.least
        self._engine = engine
        self._address = address
        self._limits = limits
        self._owner = owner
        self._flags = socket.MSG_PEEK if keep_header else 0
        self._parked: dict[_Parked, None] = {}  # in the order in which they were dialled
        self._resting = False
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

    def rest(self) -> None:
        """Dial nothing until `resume`; visitors that come use up what is parked."""
        self._resting = True

    def review(self) -> bool:
        """Shrink the pool if it is larger than it needs to be; tells whether there is a surplus to trim."""
        self.size = shrunk(self.size, self._busiest, self._limits)
        self._busiest = 0
        return len(self._parked) > self.size

    def close(self) -> None:
        """Let go of everything parked. A visitor whose header has arrived already is still handed over."""
        self._resting = True
        for parked in list(self._parked):
            self._look(parked)
            if parked in self._parked:
                self._forget(parked)
                parked.connection.close()

    def _dial(self) -> None:
        try:
            connection = dial_nowait(self._address)
        except OSError as error:
            self._in_trouble(reason_of(error))
            return
        parked = _Parked(self, connection)
        self._parked[parked] = None
        parked.watching = self._engine.watch(connection, parked.look, self._owner.failed)

    def _look(self, parked: _Parked) -> None:
        """Something happened on a parked connection: has a visitor come, or the end?"""
        try:
            whole = parked.receive(self._flags)
        except BlockingIOError:
            return
        except (EOFError, RemoteProtocolError) as error:
            self._lost(parked, str(error))
        except OSError as error:
            self._lost(parked, reason_of(error))
        else:
            self._forget(parked)
            self._count()
            self._owner.take(SocketWay(self._engine, parked.connection), whole)
            if not self._resting:
                self.resume()

    def _count(self) -> None:
        """One more visitor in this window; does the pool want to be larger?"""
        now = trio.current_time()
        if now - self._window_began >= WINDOW:
            self._window_began, self._arrivals = now, 0
        self._arrivals += 1
        self._busiest = max(self._busiest, self._arrivals)
        self.size = grown(self.size, self._arrivals, self._limits)

    def _lost(self, parked: _Parked, reason: str) -> None:
        self._forget(parked)
        parked.connection.close()
        if len(self._parked) < self.size:
            self._in_trouble(reason)

    def _in_trouble(self, reason: str) -> None:
        """Told once: whoever rests already knows."""
        if not self._resting:
            self._resting = True
            self._owner.trouble(reason)

    def _forget(self, parked: _Parked) -> None:
        del self._parked[parked]
        if parked.watching is not None:
            parked.watching.release()


class _Parked:
    """One connection, and what has come of its header."""

    __slots__ = ("_pool", "connection", "head", "watching")

    def __init__(self, pool: Pool, connection: socket.socket) -> None:
        self._pool = pool
        self.connection = connection
        self.head = b""
        self.watching: Registration | None = None

    def look(self) -> None:
        if self in self._pool._parked:
            self._pool._look(self)

    def receive(self, flags: int) -> bytes:
        """The header, once it is whole, and not an octet more; `flags` may be MSG_PEEK.

        Raises `BlockingIOError` while it is not, `EOFError` when the relay closed, `RemoteProtocolError`, `OSError`.
        """
        while missing := missing_v2(self.head) if self.head else COMMON_V2:
            held = len(self.head) if flags else 0  # peeking shows again what has been seen
            data = self.connection.recv(held + missing, flags)
            if not data:
                raise EOFError("connection closed by the relay")
            if len(data) == held:
                raise BlockingIOError
            self.head = data if flags else self.head + data
        return self.head
