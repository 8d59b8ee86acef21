"""The queue between the ingresses of a tunnel and its server side: visitors without a server connection.

A visitor that finds a server connection parked is joined to it inside the engine's callback and never has a task. One
that finds none waits in a task of the tunnel's nursery until a server connection arrives, `pairing_timeout` is over, or
the visitor's connection is reset.

An end of file is not taken for the end of the visitor. TCP does not tell a client that has closed from one that sends
nothing more and reads (`nc -N`, a client of a server that speaks first), so both wait, with their request or without
one, and the hidden server learns of the end of file as if it had accepted the connection itself.

A server connection that turns out to have failed before anything was read from the visitor costs the visitor nothing:
it gets another one.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace

import trio

from tunneld.auth.authority import VisitorAuthority
from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import reason_of
from tunneld.net.endpoint import Peer
from tunneld.net.sockets import taken_out
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.policy.limits import EffectiveLimits
from tunneld.tunnel.server_side import ServerConnection, ServerSide
from tunneld.tunnel.snapshot import WaitingVisitor
from tunneld.tunnel.visitor import Visitor
from tunneld.tunnel.visitors import VisitorRelays

MAX_PAIRINGS = 8
"""Server connections that one visitor gets, if all of them have failed already: as many as an agent parks in a quiet
tunnel. A server side that has no other kind is broken, and the visitor should learn that.
"""


class WaitingVisitors:
    """Pairs the visitors of one tunnel with server connections. `len` is the number of those that wait. Implements
    `Arrivals`.
    """

    def __init__(self, limits: EffectiveLimits, relays: VisitorRelays, authority: VisitorAuthority) -> None:
        """`relays` accepts the visitors, and gets them once they have a server connection. `authority` is asked about
        each of them before.
        """
        self._limits = limits
        self._authority = authority
        self._relays = relays
        self._waiting: dict[Visitor, float] = {}  # each with its deadline in Trio's time
        self._inherited: Sequence[Visitor] = ()  # of the tunnel that this one replaces, until `start`
        self._engine: Engine
        self._server_side: ServerSide
        self._nursery: trio.Nursery
        self._on_failure: FailureCallback

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def peers(self) -> Sequence[Peer]:
        """The addresses of visitors that wait."""
        return [visitor.peer for visitor in self._waiting]

    def start(
        self,
        engine: Engine,
        server_side: ServerSide,
        nursery: trio.Nursery,
        on_failure: FailureCallback,
        adopted: Sequence[WaitingVisitor],
    ) -> None:
        """Pair visitors from now on, `adopted` ones of another process first. `nursery` owns the tasks of those that
        wait; `on_failure` is called with bugs.
        """
        self._engine, self._server_side, self._nursery, self._on_failure = engine, server_side, nursery, on_failure
        asks = self._authority.is_active  # again: it is not known whether the other process got an answer
        for one in adopted:
            self._wait(one.visitor, trio.current_time() + one.seconds_left, is_authorized=not asks)
        inherited, self._inherited = self._inherited, ()
        for visitor in inherited:
            if not visitor.has_left:
                self.arrive(visitor)

    def inherit(self, former: WaitingVisitors) -> None:
        """Take over the visitors that wait in `former`, which closes; they arrive here at `start`."""
        self._inherited, former._waiting = list(former._waiting), {}

    def discard(self) -> None:
        """Refuse the inherited visitors of a tunnel that never starts."""
        inherited, self._inherited = self._inherited, ()
        for visitor in inherited:
            visitor.refuse()

    def arrive(self, visitor: Visitor) -> None:
        """See `Arrivals.arrive`."""
        if (refusal := self._relays.admit(visitor, len(self._waiting))) is not None:
            self.refuse(visitor, refusal)
        elif not self._authority.is_active:
            self._pair(visitor)
        elif (answer := self._authority.remembered(visitor.peer[0])) is None:
            self._wait(visitor, trio.current_time() + self._limits.pairing_timeout, is_authorized=False)
        elif answer.allow:
            self._pair(visitor)
        else:
            self._give_up(visitor, answer.reason, RefusalKind.DENIED)

    def refuse(self, visitor: Visitor, refusal: AdmissionRefusal) -> None:
        """See `Arrivals.refuse`."""
        visitor.refuse(refusal)
        self._relays.refused(visitor, refusal)

    def export(self) -> Sequence[WaitingVisitor]:
        """Hand over the visitors that wait, without closing them. The caller owns their ends. Requests on a shared HTTP
        connection end with this process.
        """
        now = trio.current_time()
        waiting, self._waiting = self._waiting, {}
        exported = []
        for one, deadline in waiting.items():
            if isinstance(one.end, socket.socket):
                left = max(0.0, deadline - now)
                exported.append(WaitingVisitor(replace(one, end=taken_out(one.end)), left))
            else:
                one.refuse()
        return exported

    def _pair(self, visitor: Visitor, deadline: float | None = None) -> None:
        """Join a visitor to a parked server connection, or let it wait for one: until `deadline`, or for the whole
        `pairing_timeout`.
        """
        for _ in range(MAX_PAIRINGS):
            try:
                server = self._server_side.dial_nowait()
            except trio.WouldBlock:
                if deadline is None:
                    deadline = trio.current_time() + self._limits.pairing_timeout
                self._wait(visitor, deadline)
                return
            if self._relays.relay(visitor, server):
                return
        self._give_up(visitor, f"{MAX_PAIRINGS} server connections in a row had failed")

    def _wait(self, visitor: Visitor, deadline: float, *, is_authorized: bool = True) -> None:
        self._waiting[visitor] = deadline
        self._nursery.start_soon(self._wait_for_server, visitor, deadline, is_authorized)

    async def _wait_for_server(self, visitor: Visitor, deadline: float, is_authorized: bool) -> None:
        """Hold one visitor until a server connection arrives, the visitor's is reset, or the deadline is over. One
        that `is_authorized` no longer has to be asked about.
        """
        kind = RefusalKind.UNSERVED
        reason = f"no server connection within {self._limits.pairing_timeout:g} s (pairing_timeout)"
        server: ServerConnection | None = None

        def on_left(error: OSError) -> None:
            nonlocal reason
            reason = f"the visitor left before a server connection arrived: {reason_of(error)}"
            scope.cancel()

        watching = visitor.watch(self._engine, on_left, self._on_failure)
        try:
            with trio.move_on_at(deadline) as scope:
                if not is_authorized and not (answer := await self._authority.ask(visitor.peer[0])).allow:
                    kind, reason = RefusalKind.DENIED, answer.reason
                else:
                    server = await self._server_side.dial()
        except trio.ClosedResourceError:
            reason = "the tunnel accepts no new visitors"
        finally:
            is_here = self._waiting.pop(visitor, None) is not None  # and not exported or inherited
            watching.release()
            if server is None and is_here:
                visitor.refuse(AdmissionRefusal(kind, "not served"))
        if not is_here:
            if server is not None:
                server.close()
        elif server is None:
            self._relays.pairing_failed(visitor, AdmissionRefusal(kind, reason))
        elif not self._relays.relay(visitor, server):
            self._pair(visitor, deadline)

    def _give_up(self, visitor: Visitor, reason: str, kind: RefusalKind = RefusalKind.UNSERVED) -> None:
        visitor.refuse(AdmissionRefusal(kind, "not served"))
        self._relays.pairing_failed(visitor, AdmissionRefusal(kind, reason))
