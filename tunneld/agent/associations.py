"""The association of one tunnel with a relay's EGTP node: every visitor is a stream in messages.

    task        dials while an association has no link, or there is none, else sleeps; cancelling it closes all
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

import os
from typing import cast

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.agent.end_visitor import EndVisitor, VisitorSink
from tunneld.agent.network import is_local_address
from tunneld.agent.source import SourceEvents
from tunneld.egtp.carrier import AssociationLimits, EgtpCarrier
from tunneld.egtp.handshake import NodeConnection, begin_session
from tunneld.egtp.link import Link
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import (
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    RemoteProtocolError,
    ShortageError,
)
from tunneld.mux.channel import Channel
from tunneld.mux.limits import CarrierLimits
from tunneld.net.dial import dial, resolve_relay
from tunneld.net.endpoint import Endpoint
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.wire.egtp.attaching import UNKNOWN_ASSOCIATION, AttachRequest
from tunneld.wire.egtp.envelope import ID_SIZE
from tunneld.wire.mencode import Value

FIRST_DIAL_DELAY, MAX_DIAL_DELAY = 0.25, 2.0
"""Seconds between attempts to dial, as for carriers."""
TIMES = AssociationLimits(resume_timeout=60.0, max_channels=1_000_000)
"""The relay decides how many visitors there are and how long they wait; it says so when it is asked."""


class Associations:
    """The association of one tunnel, and those before it that still have visitors. Implements `ConnectionSource`."""

    size = 0

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
    ) -> None:
        """`uri` is the server URI, `identity` the key whose id the relay was told. `nursery` runs the task that dials.
        `keep_header`: leave the PROXY header in front of the visitor's bytes.
        """
        self.visitor_sink = VisitorSink(events.on_visitor, events.on_failure, keep_header)
        self.closed = False  # no new visitors; it ends with the last one
        self._engine = cast(Pump, engine)
        self._relay = relay
        self._uri = uri
        self._identity = identity
        self._events = events
        self._limits = limits or CarrierLimits()
        self._all: dict[_AgentAssociation, None] = {}  # at most one of them takes new visitors
        self._nursery = nursery
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._paused = True
        self._running = False  # the dialling task exists
        self._attempt = trio.CancelScope()  # around one attempt, or the delay before the next

    @property
    def parked(self) -> int:
        """1 while the relay can send visitors, else 0."""
        return sum(each.carrier.attached and not each.retired for each in self._all)

    def resume(self) -> None:
        """See `ConnectionSource.resume`."""
        self.closed = self._paused = False
        self._wake.set()
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    def pause(self) -> None:
        """See `ConnectionSource.pause`."""
        self._paused = True

    def resize(self) -> bool:
        """Return False: no connection is parked at the relay."""
        return False

    def probe(self) -> None:
        """Replace a link if this machine lost its address, else ping the relay; begin a running attempt to dial again
        from the beginning.
        """
        for each in list(self._all):
            each.probe()
        self._attempt.cancel()
        self._wake.set()

    def close(self) -> None:
        """Take no new visitors: each association ends with the last one on it."""
        self.closed = self._paused = True
        self._attempt.cancel()
        self._wake.set()
        for each in list(self._all):
            each.retire()

    def withdraw(self) -> None:
        """See `ConnectionSource.withdraw`."""
        self.close()

    async def wait_withdrawn(self) -> None:
        """See `ConnectionSource.wait_withdrawn`."""
        while not all(each.confirmed for each in self._all):
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """See `ConnectionSource.wait_closed`."""
        while self._all:
            await self._changed.wait()

    # Called by the association

    def on_detached(self) -> None:
        """The link is lost: dial another one."""
        self._wake.set()

    def on_closed(self, association: _AgentAssociation, reason: str) -> None:
        """The association is over."""
        if association in self._all:
            del self._all[association]
            if not association.retired:
                self._events.on_trouble(f"connection to the relay lost: {reason}")
        self.notify_changed()
        self._wake.set()

    def notify_changed(self) -> None:
        """The association ended, or the relay knows that it is to end: wake the waiting tasks."""
        self._changed.set()
        self._changed = trio.Event()

    # Inside

    async def _run(self) -> None:
        """Dial whenever a link is missing, until `close` and the end of the last association."""
        backoff = Backoff(first=FIRST_DIAL_DELAY, longest=MAX_DIAL_DELAY)
        try:
            while self._all or not self.closed:
                association = next((each for each in self._all if not each.carrier.attached), None)
                if association is None and (self._paused or not all(each.retired for each in self._all)):
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                with trio.CancelScope() as self._attempt:
                    if await self._dial(association):
                        backoff.reset()
                    else:
                        await trio.sleep(backoff.next_delay())
        finally:
            self._running = False
            self.closed = True
            for each in list(self._all):
                each.carrier.close("the agent stopped")

    async def _dial(self, association: _AgentAssociation | None) -> bool:
        """Make a link for this association, or for a new one. Returns whether the relay accepted it; a failure is
        reported as trouble.
        """
        try:
            async with self._relay.dialing:
                node = await self._connect()
                try:
                    return await self._attach(node, association)
                except BaseException:
                    node.connection.close()
                    raise
        except (RelayUnreachableError, ShortageError, RemoteProtocolError, NotAllowedError, RefusedError) as error:
            self._events.on_trouble(str(error))
            return False

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

    async def _attach(self, node: NodeConnection, association: _AgentAssociation | None) -> bool:
        """Go on with the association on this connection, or begin one. Raises `RelayUnreachableError`,
        `RemoteProtocolError` or `RefusedError`.
        """
        if association is not None:
            try:
                received = await self._ask(node, association)
            except RefusedError as error:
                if str(error) != UNKNOWN_ASSOCIATION:
                    raise
                association.carrier.close(f"the relay closed it: {error}")
                node.connection.close()
                return True  # a new one gets a connection of its own
        else:
            association = _AgentAssociation(self, self._engine, self._limits)
            received = await self._ask(node, association)
            if self._paused:  # meanwhile: there is nothing to resume
                association.carrier.close("not needed")
            self._all[association] = None
        if association.carrier.over:
            node.connection.close()
            self._all.pop(association, None)
            return False
        association.attach(node, received)
        return True

    async def _ask(self, node: NodeConnection, association: _AgentAssociation) -> int:
        request = AttachRequest(association.id, association in self._all, association.carrier.inbox.next)
        with self._relay.connecting(self._uri):
            return _received_in(await node.ask(request.encode()))


def _received_in(body: Value) -> int:
    """How many of our messages the relay has. Raises `RemoteProtocolError`."""
    match body:
        case {b"received": int(received)} if received >= 0:
            return received
    raise RemoteProtocolError("the relay's response to 'are there messages' is invalid")


class _AgentAssociation:
    """The agent's side of one association. Implements `AssociationEvents`."""

    def __init__(self, owner: Associations, engine: Pump, limits: CarrierLimits) -> None:
        self.id = os.urandom(ID_SIZE)
        self.retired = False  # takes no new visitors, and ends with the last one
        self.confirmed = False  # the relay knows that
        self.carrier = EgtpCarrier(engine, self, initiator=True, limits=limits, times=TIMES)
        self._owner = owner
        self._address: tuple[str, int] | tuple[str, int, int, int] = ("", 0)

    def attach(self, node: NodeConnection, received: int) -> None:
        """Go on with another link."""
        carrier = self.carrier
        self._address = node.connection.getsockname()
        link = Link(carrier.pump, node.connection, node.session, node.frames, carrier.limits)
        carrier.attach(link, received)

    def probe(self) -> None:
        """Drop the link if this machine lost its address, else ping the relay."""
        if self.carrier.attached and not is_local_address(self._address):
            self.carrier.on_dead("this machine's address changed")
        else:
            self.carrier.heartbeat.ping_now()

    def retire(self) -> None:
        """Ask the relay for no more visitors. Visitors that it sent before arrive before its acknowledgement."""
        if not self.retired:
            self.retired = True
            self.carrier.retire()

    def on_opened(self, channel: Channel, _label: bytes) -> None:
        """The relay opened a channel for a visitor; its PROXY header comes first."""
        channel.handler = EndVisitor(channel, self._owner.visitor_sink)

    def on_capacity(self) -> None:
        """A visitor left. Before a retired association ends, the relay must have everything of the last one."""
        if self.retired and not self.carrier.channels:
            self.carrier.ask()

    def on_retired(self) -> None:
        """Ignore this: an agent opens no channels."""

    def on_settled(self) -> None:
        """The relay has everything that was sent."""
        if self.retired:
            self.confirmed = True
            self._owner.notify_changed()
            if not self.carrier.channels:
                self.carrier.close("the agent has no more visitors")

    def on_unresponsive(self) -> None:
        """Nothing: the heartbeat gives the link up if this lasts."""

    def on_detached(self, _reason: str) -> None:
        """The link is lost."""
        self._owner.on_detached()

    def on_closed(self, reason: str) -> None:
        """The association is over."""
        self._owner.on_closed(self, reason)
