"""Each visitor's way from the pool to the local server.

    taken ──► local server is dialled ──► joined ──► left
                     │                      │
                     └──────► failed ◄──────┘       refused at once, or only when the answer came

While the local server is known to be unhealthy it is not dialled, and taken leads to failed at once.

The visitor is joined to the local server's socket while that is still connecting: what the visitor says waits for it in
the kernel. So a refusal is often heard of only at the relay's end.
"""

from __future__ import annotations

import errno
import socket

import trio

from tunneld.agent import health
from tunneld.agent.events import FAILURE_REPORTS, MAX_MESSAGES, Reporter
from tunneld.agent.local import LocalServer
from tunneld.agent.source import VisitorConnection
from tunneld.engine.engine import Cause, Relay, RelayEnd, Side
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.net.dial import check_not_refused
from tunneld.net.endpoint import join_host_port
from tunneld.policy.rates import LogLimiter
from tunneld.wire.proxy_protocol import decode_v2

_NEVER_CONNECTED = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EACCES}
)


class LocalVisitors:
    """The visitors that are being served, and the counts of those that were."""

    def __init__(
        self, local: LocalServer, nursery: trio.Nursery, teller: Reporter, *, linger: float, http: bool = False
    ) -> None:
        """`nursery` owns the few visitors for whom the local server is dialled the long way. `linger` in seconds.
        `http`: who comes while that does not answer is told so over HTTP.
        """
        self.served = 0
        self.failed = 0
        self._stirred_at = trio.current_time()  # when the last one left, or could not be served
        self._local = local
        self._nursery = nursery
        self._teller = teller
        self._linger = linger
        self._http = http
        self._relays: dict[Relay, bytes] = {}  # each with its visitor's PROXY header
        self._ended_up = self._ended_down = 0
        self._repeats = LogLimiter(FAILURE_REPORTS, MAX_MESSAGES)
        self._away: str | None = None  # why nobody is served at present
        self._answering = False  # over HTTP
        self._being_answered = 0
        self._being_dialled = 0  # for so many visitors the local server is
        self._fewer = trio.Event()

    @property
    def now(self) -> int:
        """Visitors that are being served."""
        return len(self._relays)

    @property
    def stirred_at(self) -> float:
        """When somebody was last here, in `trio.current_time`."""
        return trio.current_time() if self._relays else self._stirred_at

    @property
    def octets(self) -> tuple[int, int]:
        """Octets delivered so far: up (to the local server), down (to visitors)."""
        up = self._ended_up + sum(relay.up for relay in self._relays)
        return up, self._ended_down + sum(relay.down for relay in self._relays)

    async def wait_none(self) -> None:
        """Wait until nobody is being served."""
        while self._relays or self._being_answered or self._being_dialled:
            await self._fewer.wait()

    def _one_less(self) -> None:
        self._fewer.set()
        self._fewer = trio.Event()

    def drop(self) -> None:
        """The exposure is over, and so are those who are being served."""
        self.turn_away("the agent stopped", answering=False)
        for relay in list(self._relays):
            relay.drop()
            self._left(relay, RelayEnd(Cause.DROPPED))

    def serve(self) -> None:
        """Serve whoever comes from now on. Harmless when repeated."""
        self._away = None

    def turn_away(self, reason: str, *, answering: bool) -> None:
        """Serve nobody who comes from now on: they are closed, or, `answering`, told so over HTTP."""
        self._away, self._answering = reason, answering

    def take(self, way: VisitorConnection, header: bytes) -> None:
        """Serve one visitor: dial the local server and relay. Never waits; `way` is ours from now on."""
        if self._away is not None:
            self._refuse(way, header, self._away)
            return
        try:
            server = self._local.dial_nowait()
            if self._http:
                check_not_refused(server)
        except trio.WouldBlock:
            self._nursery.start_soon(self._take_patiently, way, header)
        except OSError as error:
            self._lose(way, header, error)
        else:
            self._join(way, server, header)

    def _refuse(self, way: VisitorConnection, header: bytes, reason: str) -> None:
        self._end(way, reason, answering=self._answering)
        self._fail(header, reason)

    def _end(self, way: VisitorConnection, reason: str, *, answering: bool) -> None:
        if answering and self._being_answered < health.MAX_ANSWERS:
            self._nursery.start_soon(self._answer, way)
        else:
            way.close(reason)

    async def _answer(self, way: VisitorConnection) -> None:
        self._being_answered += 1
        try:
            await health.answer(way.stream())
        except BaseException:
            way.close("the agent stopped")
            raise
        finally:
            self._being_answered -= 1
            self._one_less()

    async def _take_patiently(self, way: VisitorConnection, header: bytes) -> None:
        self._being_dialled += 1
        try:
            server = await self._local.dial()
        except OSError as error:
            self._lose(way, header, error)
        except BaseException:
            way.close("the agent stopped")
            raise
        else:
            self._join(way, server, header)
        finally:
            self._being_dialled -= 1
            self._one_less()

    def _join(self, way: VisitorConnection, server: socket.socket, header: bytes) -> None:
        self.served += 1
        self._relays[way.join(server, linger=self._linger, on_end=self._left)] = header
        if self._teller.wants_visitors:
            self._teller.report("visitor", visitor=visitor_of(header))

    def _left(self, relay: Relay, end: RelayEnd) -> None:
        header, up, down = self._relays.pop(relay, None), relay.up, relay.down
        if header is None:  # dropped, and told already
            return
        self._ended_up += up
        self._ended_down += down
        if not self._relays:
            self._stirred_at = trio.current_time()
            self._one_less()
        if end.error is not None and end.side is Side.SERVER and _never_connected(end.error, up + down):
            self.served -= 1
            self._local.failed()
            self._fail(header, self._no_connection(end.error))
        elif self._teller.wants_visitors:
            who, why = visitor_of(header), describe(end)
            self._teller.report("left", visitor=who, up=up, down=down, reason=why)

    def _lose(self, way: VisitorConnection, header: bytes, error: OSError) -> None:
        """The local server cannot be dialled for this visitor."""
        reason = self._no_connection(error)
        self._end(way, reason, answering=self._http)
        self._fail(header, reason)

    def _no_connection(self, error: OSError) -> str:
        return f"could not connect to {self._local.target}: {reason_of(error)}"

    def _fail(self, header: bytes, reason: str) -> None:
        self.failed += 1
        self._stirred_at = now = trio.current_time()
        repeated = self._repeats.passes(now, reason)
        if repeated is not None:
            self._teller.report("failed", visitor=visitor_of(header), reason=reason, repeated=repeated)


def visitor_of(header: bytes) -> str:
    """The visitor's address in a PROXY header: `203.0.113.5:4242`, or `unknown`."""
    try:
        decoded = decode_v2(header)
    except RemoteProtocolError:
        return "unknown"
    source = decoded[0].source if decoded else None
    return join_host_port(*source) if source else "unknown"


def describe(end: RelayEnd) -> str:
    """Why a relay ended, in words."""
    if end.cause is not Cause.RESET:
        return str(end.cause.value)
    side = "the local server" if end.side is Side.SERVER else "the visitor"
    return f"{side} broke off: {reason_of(end.error)}" if end.error else f"{side} broke off"


def _never_connected(error: OSError, octets: int) -> bool:
    return error.errno in _NEVER_CONNECTED and not octets
