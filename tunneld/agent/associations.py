"""The association of one tunnel with a relay's EGTP node: every visitor is a stream in messages.

    task        dials while an association has no link, or there is none, else sleeps; cancelling it closes all. Or, if
                a connection cannot be held: dials at intervals (`polling`)
    link        one connection; the session proves the relay's node id and ours, and the relay's answer to `are there
                messages` says whether it still knows the association
    visitor     a channel that the relay opened: its PROXY header is read, then the channel is handed over

A link that is lost is replaced at once, and visitors do not notice: what the other end did not acknowledge is sent
again. If the relay has forgotten the association, because it was restarted or does not wait any longer, the visitors
are cut and a new association begins.

Dialling fails in two ways, both of them *trouble*: the relay cannot be reached, or it does not know the tunnel. The
session checks the tunnel then, and calls `resume`. Without a control connection dialling pauses after a failure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import cast

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.association import AgentAssociation
from tunneld.agent.backoff import Backoff
from tunneld.agent.end_visitor import VisitorSink
from tunneld.agent.polling import exchange
from tunneld.agent.retiring import RetiringSource, SourcePart
from tunneld.agent.source import SourceEvents
from tunneld.egtp.handshake import NodeConnection, begin_session
from tunneld.egtp.session import RejectedError
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import (
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    RemoteProtocolError,
    ShortageError,
)
from tunneld.mux.limits import CarrierLimits
from tunneld.net.dial import dial, resolve_relay
from tunneld.net.endpoint import Endpoint
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.attaching import UNKNOWN_ASSOCIATION
from tunneld.wire.mencode import Value

FIRST_DIAL_DELAY, MAX_DIAL_DELAY = 0.25, 2.0
"""Seconds between attempts to dial, as for carriers."""


class Associations(RetiringSource):
    """The association of one tunnel, and those before it that still have visitors. Implements `ConnectionSource`."""

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        uri: Endpoint,
        identity: Identity,
        events: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
        limits: CarrierLimits | None = None,
        poll: int = 0,
    ) -> None:
        """`uri` is the server URI, `identity` the key whose id the relay was told. `nursery` runs the task that dials.
        `keep_header`: leave the PROXY header in front of the visitor's bytes. `poll` is the interval between polls in
        seconds; 0: hold a connection.
        """
        super().__init__()
        self.visitor_sink = VisitorSink(events.on_visitor, events.on_failure, keep_header)
        self._engine = cast(Pump, engine)
        self._relay = relay
        self._uri = uri
        self._identity = identity
        self._events = events
        self._limits = limits or CarrierLimits()
        self._all: dict[AgentAssociation, None] = {}  # at most one of them takes new visitors
        self._nursery = nursery
        self._poll = poll
        self._wake = trio.Event()
        self._running = False  # the dialling task exists
        self._attempt = trio.CancelScope()  # around one attempt, or the delay before the next

    @property
    def parked(self) -> int:
        """1 while the relay can send visitors, else 0."""
        return sum(each.is_served and not each.retired for each in self._all)

    def resume(self) -> None:
        """See `ConnectionSource.resume`."""
        self.closed = self.paused = False
        self._wake.set()
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run, self._poll_all if self._poll else self._hold)

    def probe(self) -> None:
        """Replace a link if this machine lost its address, else ping the relay; begin a running attempt to dial again
        from the beginning.
        """
        for each in list(self._all):
            each.probe()
        self._attempt.cancel()
        self._wake.set()

    @property
    def parts(self) -> Iterable[SourcePart]:
        """See `RetiringSource.parts`."""
        return self._all

    def close(self) -> None:
        """See `RetiringSource.close`."""
        super().close()
        self._attempt.cancel()
        self._wake.set()

    # Called by the association

    def on_detached(self) -> None:
        """The link is lost: dial another one."""
        if not self._poll:
            self._wake.set()

    def wake(self) -> None:
        """An association without a link has something to send."""
        self._wake.set()

    def on_closed(self, association: AgentAssociation, reason: str) -> None:
        """The association is over."""
        if association in self._all:
            del self._all[association]
            if not association.retired:
                self._events.on_trouble(f"connection to the relay lost: {reason}")
        self.notify_changed()
        self._wake.set()

    # Inside

    async def _run(self, serve: Callable[[Backoff], Awaitable[None]]) -> None:
        """Serve until `close` and the end of the last association."""
        backoff = Backoff(first=FIRST_DIAL_DELAY, longest=MAX_DIAL_DELAY)
        try:
            while self._all or not self.closed:
                await serve(backoff)
        finally:
            self._running = False
            self.closed = True
            for each in list(self._all):
                each.carrier.close("the agent stopped")

    async def _hold(self, backoff: Backoff) -> None:
        """Dial if a link is missing, else sleep."""
        association = next((each for each in self._all if not each.carrier.attachment.attached), None)
        if association is None and not self._needs_another:
            self._wake = trio.Event()
            await self._wake.wait()
            return
        with trio.CancelScope() as self._attempt:
            if await self._dial(association) is not None:
                backoff.reset()
            else:
                await trio.sleep(backoff.next_delay())

    async def _poll_all(self, backoff: Backoff) -> None:
        """Poll once for each association, and sleep until the next poll or until there is something to send."""
        self._wake = trio.Event()
        waiting: list[AgentAssociation | None] = [*self._all, *([None] if self._needs_another else [])]
        results: list[bool] = []

        async def poll(association: AgentAssociation | None) -> None:
            if association is None or not association.carrier.attachment.attached:
                association = await self._dial(association)
            results.append(association is not None and await exchange(association))

        with trio.CancelScope() as self._attempt:
            async with trio.open_nursery() as nursery:
                for association in waiting:
                    nursery.start_soon(poll, association)
        delay = float(self._poll)
        if all(results):
            backoff.reset()
        else:
            delay = backoff.next_delay()
        if not waiting:
            await self._wake.wait()
        elif not all(results) or all(each.carrier.attachment.settled for each in self._all):
            with trio.move_on_after(delay):
                await self._wake.wait()

    @property
    def _needs_another(self) -> bool:
        """Whether an association is to begin: none takes visitors, and they are wanted."""
        return not self.paused and all(each.retired for each in self._all)

    async def _dial(self, association: AgentAssociation | None) -> AgentAssociation | None:
        """Make a link for this association, or for a new one. Returns the association if the relay accepted it; a
        failure is reported as trouble.
        """
        try:
            async with self._relay.dialing:
                node = await self._connect()
                try:
                    return await self._attach(node, association)
                except BaseException:
                    node.connection.close()
                    raise
        except RejectedError as error:
            if self.closed and association is not None and not association.carrier.channels:
                association.carrier.end("the tunnel closed")  # there is nothing left to tell the relay
            else:
                self._events.on_trouble(str(error))
            return None
        except (RelayUnreachableError, ShortageError, RemoteProtocolError, NotAllowedError, RefusedError) as error:
            self._events.on_trouble(str(error))
            return None

    async def _connect(self) -> NodeConnection:
        """Connect to the relay and begin a session, in which it proves the id in the URI; the caller owns the
        connection. Raises as `RelayAccess.connecting`, `RemoteProtocolError`, or `NotAllowedError` for another node.
        """
        uri = self._uri
        with self._relay.connecting(uri):
            connection = await dial(await resolve_relay(uri.host, uri.port))
            try:
                return await begin_session(connection, self._identity, NodeId.parse(uri.key))
            except BaseException:
                connection.close()
                raise

    async def _attach(self, node: NodeConnection, association: AgentAssociation | None) -> AgentAssociation | None:
        """Go on with the association on this connection, or begin one. Raises `RelayUnreachableError`,
        `RemoteProtocolError` or `RefusedError`.
        """
        association = association or AgentAssociation(self, self._engine, self._limits, self._poll)
        try:
            answer = await self._ask(node, association)
        except RefusedError as error:
            if str(error) != UNKNOWN_ASSOCIATION:
                raise
            association.carrier.close(f"the relay closed it: {error}")
            node.connection.close()
            return association  # a new one gets a connection of its own
        if not association.known:
            if self.paused:  # meanwhile: there is nothing to resume
                association.carrier.close("not needed")
            self._all[association] = None
        if association.carrier.over:
            node.connection.close()
            self._all.pop(association, None)
            return None
        association.attach(node, 0 if self._poll else _received_in(answer))
        if self._poll:
            association.carrier.attachment.on_mail(answer)
        return association

    async def _ask(self, node: NodeConnection, association: AgentAssociation) -> Value:
        with self._relay.connecting(self._uri):
            return await node.ask(association.request().encode())


def _received_in(body: Value) -> int:
    """How many of our messages the relay has. Raises `RemoteProtocolError`."""
    match body:
        case {b"received": int(received)} if received >= 0:
            return received
    raise RemoteProtocolError("the relay's response to 'are there messages' is invalid")
