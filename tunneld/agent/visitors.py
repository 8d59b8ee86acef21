"""The visitors of one exposure, from their arrival to the local server and their end.

    take ──► local server is dialled ──► joined ──► left
                     │                     │
                     └──────► failed ◄─────┘       refused at once, or only after the join

While the local server is known to be unhealthy it is not dialled, and visitors fail at once.

A visitor is joined to the local server's socket while that is still connecting: the visitor's bytes wait in the kernel.
So a refusal often shows only when the relay between the two ends.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from tunneld.agent import health
from tunneld.agent.events import FAILURE_REPORTS, MAX_LATEST, MAX_MESSAGES, Field, LatestVisitor, Reporter
from tunneld.agent.local import LocalServer
from tunneld.agent.source import VisitorConnection
from tunneld.engine.end import End
from tunneld.engine.engine import Cause, Engine, Relay, RelayEnd, Side
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.net.dial import check_not_refused
from tunneld.net.endpoint import join_host_port
from tunneld.policy.rates import LogLimiter
from tunneld.wire.proxy_protocol import decode_v2

_CONNECT_ERRORS = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EACCES}
)


CAUSE_DELAY = 1.0
"""Seconds for the cause of a failed connection to be found out: a round trip, and the relay's end of other connections.
"""
MAX_HELD = 1000
"""Failed connections that wait for that, at some 500 bytes each."""


class VisitorTap(Protocol):
    """A tap of one visitor's connection to the local server, see agent/inspection.py."""

    def server_end(self, engine: Engine, server: socket.socket) -> End:
        """The connected socket as an end with this tap. Raises OSError, and closes the socket then."""

    def end(self) -> None:
        """The connection has ended."""


class LocalVisitors:
    """The visitors being served, and the counts of past ones."""

    def __init__(
        self,
        engine: Engine,
        locals_: Sequence[LocalServer],
        nursery: trio.Nursery,
        reporter: Reporter,
        *,
        linger: float,
        http: bool = False,
        on_left: Callable[[], None] = lambda: None,
        new_tap: Callable[[str], VisitorTap | None] | None = None,
    ) -> None:
        """Of several `locals_`, a visitor gets the one in the place that its port has in `public_ports`. `nursery` runs
        the tasks of the few visitors that need one. `linger` in seconds, see `Engine.join`. `http`: if the local server
        cannot be dialled, answer visitors with HTTP status 503. `on_left` is called when a visitor has left. `new_tap`
        makes a tap for a visitor with this address, where the exposure is inspected.
        """
        self._on_left = on_left
        self.served = 0
        self.failed = 0
        self._engine = engine
        self.public_ports: Sequence[int] = ()
        """The public ports, if there are several; set by the owner once they are known."""
        self._locals = locals_
        self._nursery = nursery
        self._reporter = reporter
        self._linger = linger
        self._http = http
        self._relays: dict[Relay, _ServedVisitor] = {}
        self._latest: deque[_ServedVisitor] = deque(maxlen=MAX_LATEST)  # also visitors that have left
        self._new_tap = new_tap
        self._taps: dict[Relay, VisitorTap] = {}
        self._ended_up = self._ended_down = 0  # bytes of relays that have ended
        self._repeats = LogLimiter(FAILURE_REPORTS, MAX_MESSAGES)
        self._cut = _CutVisitors(nursery, reporter)
        self._away_reason: str | None = None  # why visitors are turned away
        self._answer_http = False  # when they are
        self._answers = 0  # visitors being answered
        self._dials = 0  # visitors for whom a task dials the local server
        self._fewer = trio.Event()
        self.first = trio.Event()  # a visitor has come

    @property
    def now(self) -> int:
        """Visitors being served."""
        return len(self._relays)

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes delivered so far: up (to the local server), down (to visitors)."""
        up = self._ended_up + sum(relay.up for relay in self._relays)
        return up, self._ended_down + sum(relay.down for relay in self._relays)

    @property
    def latest(self) -> list[LatestVisitor]:
        """The latest visitors, newest first."""
        return [visitor.describe() for visitor in reversed(self._latest)]

    async def wait_none(self) -> None:
        """Wait until no visitor is being served, answered, or waiting for the local server."""
        while self._relays or self._answers or self._dials:
            await self._fewer.wait()

    def _notify_fewer(self) -> None:
        self._fewer.set()
        self._fewer = trio.Event()

    def drop(self) -> None:
        """Close the connections of all visitors: the exposure has ended."""
        self.turn_away("the agent stopped", answer_http=False)
        for relay in list(self._relays):
            relay.drop()
            self._on_relay_end(relay, RelayEnd(Cause.DROPPED))
        self._cut.report_all()

    def explain_cuts(self, reason: str) -> None:
        """The tunnel or the relay was lost, and why: that also cut the visitors whose connections have just failed."""
        self._cut.report_all(reason)

    def accept(self) -> None:
        """Serve new visitors from now on, after `turn_away`. Harmless when repeated."""
        self._away_reason = None

    def turn_away(self, reason: str, *, answer_http: bool) -> None:
        """Close new visitors from now on; with `answer_http`, answer them with status 503 first."""
        self._away_reason, self._answer_http = reason, answer_http

    def take(self, visitor: VisitorConnection, header: bytes) -> None:
        """Serve one visitor: dial the local server and relay. Called by the source of connections; never blocks. Owns
        `visitor` from now on.
        """
        if self._away_reason is not None:
            self._close(visitor, self._away_reason, answer_http=self._answer_http)
            self.count_failure(header, self._away_reason)
            return
        try:
            local = self._local_for(header)
            if self._new_tap is not None:  # a tap takes connected sockets
                raise trio.WouldBlock
            server = local.dial_nowait()
            if self._http:
                check_not_refused(server)
        except trio.WouldBlock:
            self._nursery.start_soon(self._dial, visitor, header, local)
        except OSError as error:
            self._fail(visitor, header, local, error)
        except RemoteProtocolError as error:
            self._close(visitor, str(error), answer_http=False)
            self.count_failure(header, str(error))
        else:
            self._join(visitor, server, header, local)

    def _local_for(self, header: bytes) -> LocalServer:
        """The local server for a visitor. Raises `RemoteProtocolError` if there are several and the relay does not say
        which port the visitor came to.
        """
        if len(self._locals) == 1:
            return self._locals[0]
        decoded = decode_v2(header)
        reached = decoded[0].destination if decoded else None
        port = reached[1] if reached else 0
        if port not in self.public_ports:
            raise RemoteProtocolError("the relay did not tell to which of the ports the visitor came")
        return self._locals[self.public_ports.index(port)]

    def _close(self, visitor: VisitorConnection, reason: str, *, answer_http: bool) -> None:
        if answer_http and self._answers < health.MAX_ANSWERS:
            self._nursery.start_soon(self._answer, visitor)
        else:
            visitor.close(reason)

    async def _answer(self, visitor: VisitorConnection) -> None:
        self._answers += 1
        try:
            await health.answer(visitor.stream())
        except BaseException:
            visitor.close("the agent stopped")
            raise
        finally:
            self._answers -= 1
            self._notify_fewer()

    async def _dial(self, visitor: VisitorConnection, header: bytes, local: LocalServer) -> None:
        self._dials += 1
        try:
            server = await local.dial()
        except OSError as error:
            self._fail(visitor, header, local, error)
        except BaseException:
            visitor.close("the agent stopped")
            raise
        else:
            self._join_tapped(visitor, server, header, local)
        finally:
            self._dials -= 1
            self._notify_fewer()

    def _join_tapped(
        self, visitor: VisitorConnection, server: socket.socket, header: bytes, local: LocalServer
    ) -> None:
        """Join, with a tap if this exposure is inspected."""
        tap = None if self._new_tap is None else self._new_tap(visitor_address(header))
        if tap is None:
            self._join(visitor, server, header, local)
            return
        try:
            end = tap.server_end(self._engine, server)
        except OSError as error:
            tap.end()
            self._fail(visitor, header, local, error)
        else:
            self._taps[self._join(visitor, end, header, local)] = tap

    def _join(
        self, visitor: VisitorConnection, server: socket.socket | End, header: bytes, local: LocalServer
    ) -> Relay:
        if not self.served:
            self.first.set()
        self.served += 1
        relay = self._engine.join(visitor.end, server, linger=self._linger, on_end=self._on_relay_end)
        self._relays[relay] = served = _ServedVisitor(header, relay, local)
        self._latest.append(served)
        if self._reporter.wants_visitors:
            self._reporter.report("visitor", visitor=visitor_address(header))
        return relay

    def _on_relay_end(self, relay: Relay, end: RelayEnd) -> None:
        if self._taps and (tap := self._taps.pop(relay, None)) is not None:
            tap.end()
        served, up, down = self._relays.pop(relay, None), relay.up, relay.down
        if served is None:  # dropped, and reported already
            return
        header = served.header
        served.leave(end)
        self._ended_up += up
        self._ended_down += down
        self._on_left()
        if not self._relays:
            self._notify_fewer()
        if end.error is not None and end.side is Side.SERVER and _never_connected(end.error, up + down):
            self.served -= 1
            served.local.on_refused()
            self.count_failure(header, _connect_error(served.local, end.error))
        elif self._reporter.wants_visitors:
            left: dict[str, Field] = {
                "visitor": visitor_address(header),
                "up": up,
                "down": down,
                "reason": end_reason(end),
            }
            if end.cause is Cause.RESET and end.side is Side.VISITOR:
                self._cut.add(left)
            else:
                self._reporter.report("left", **left)

    def _fail(self, visitor: VisitorConnection, header: bytes, local: LocalServer, error: OSError) -> None:
        """Close a visitor because the local server cannot be dialled."""
        reason = _connect_error(local, error)
        self._close(visitor, reason, answer_http=self._http)
        self.count_failure(header, reason)

    def count_failure(self, header: bytes, reason: str) -> None:
        """A visitor could not be served, and is closed. `header` is its PROXY header."""
        self.failed += 1
        repeated = self._repeats.passes(trio.current_time(), reason)
        if repeated is not None:
            self._reporter.report("failed", visitor=visitor_address(header), reason=reason, repeated=repeated)


class _ServedVisitor:
    """A visitor that was joined to the local server."""

    def __init__(self, header: bytes, relay: Relay, local: LocalServer) -> None:
        self.header = header
        self.local = local
        self._relay: Relay | None = relay
        self._since = trio.current_time()
        self._left_at = 0.0
        self._moved = (0, 0)
        self._end: RelayEnd | None = None

    def leave(self, end: RelayEnd) -> None:
        """It has left; the relay, with its sockets, is not held any longer."""
        relay, self._relay = self._relay, None
        if relay is not None:
            self._moved, self._end, self._left_at = (relay.up, relay.down), end, trio.current_time()

    def describe(self) -> LatestVisitor:
        """Describe it for a view."""
        up, down = self._moved if self._relay is None else (self._relay.up, self._relay.down)
        visitor = LatestVisitor(visitor_address(self.header), self._since, up, down)
        if self._end is not None:
            visitor.left_at, visitor.reason = self._left_at, end_reason(self._end)
        return visitor


class _CutVisitors:
    """Visitors whose connection to the relay failed. Either the visitor reset it, or the tunnel or the relay is gone,
    which the session finds out in a moment; until then they are not reported.
    """

    def __init__(self, nursery: trio.Nursery, reporter: Reporter) -> None:
        self._nursery = nursery
        self._reporter = reporter
        self._held: list[dict[str, Field]] = []

    def add(self, left: dict[str, Field]) -> None:
        """Hold an event `left`."""
        self._held.append(left)
        if len(self._held) == 1:
            self._nursery.start_soon(self._report_later)
        elif len(self._held) >= MAX_HELD:
            self.report_all()

    def report_all(self, reason: str = "") -> None:
        """Report all events that are held, with this reason if there is one."""
        held, self._held = self._held, []
        for left in held:
            self._reporter.report("left", **({**left, "reason": reason} if reason else left))

    async def _report_later(self) -> None:
        await trio.sleep(CAUSE_DELAY)
        self.report_all()


def visitor_address(header: bytes) -> str:
    """The visitor's address in a PROXY header: `203.0.113.5:4242`, or `unknown`."""
    try:
        decoded = decode_v2(header)
    except RemoteProtocolError:
        return "unknown"
    source = decoded[0].source if decoded else None
    return join_host_port(*source) if source else "unknown"


def end_reason(end: RelayEnd) -> str:
    """Why a visitor's relay ended, for the event `left`."""
    if end.cause is not Cause.RESET:
        return str(end.cause.value)
    side = "the local server" if end.side is Side.SERVER else "the visitor"
    return f"connection to {side} failed: {reason_of(end.error)}" if end.error else f"connection to {side} failed"


def _connect_error(local: LocalServer, error: OSError) -> str:
    return f"could not connect to {local.target}: {reason_of(error)}"


def _never_connected(error: OSError, moved: int) -> bool:
    return error.errno in _CONNECT_ERRORS and not moved
