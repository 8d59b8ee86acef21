"""The carriers of a process: connections to a relay's shared port, each of which carries up to 126 visitors.

    RelayCarriers          one for each relay
    └─ CarrierGroup ×G     up to `MAX_TUNNELS` tunnels, and the carriers that all of them are offered on
       ├─ task             dials while no carrier answers and has places left, else sleeps. It ends with the group;
       │                   cancelling it closes all carriers
       └─ AgentCarrier ×N  one connection, see agent_carrier.py
    CarrierSource ×tunnel  what its session sees of that

So hundreds of exposures need a handful of connections, and one more exposure needs a message. The relay gives each
visitor to the carrier with the fewest. Another carrier is dialled when the existing ones are nearly full. A crowd fills
the new one before the agent learns that it was accepted; then two more are dialled, then four, and so on, so that
thousands of waiting visitors do not wait a round trip per hundred of them.

A carrier that stops answering is not dropped; another one is dialled beside it. The relay prefers the one that answers,
and if the silence was short, nothing is lost. At the relay the tunnel outlives its carriers for a while, so none of
this needs the control connection. If the relay has forgotten a tunnel, it refuses the offer. That is *trouble*: the
tunnel is offered no more until its session has checked it. Without a control connection dialling pauses after the first
failure: the relay is gone, and the control connection alone looks for it.

A relay of an earlier version takes one tunnel on a carrier: then each tunnel has a group of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import cast

import trio

from tunneld.agent.access import MAX_CONCURRENT_DIALS, RelayAccess
from tunneld.agent.agent_carrier import AgentCarrier, Offer
from tunneld.agent.backoff import Backoff
from tunneld.agent.end_visitor import VisitorSink
from tunneld.agent.retiring import RetiringSource, SourcePart
from tunneld.agent.source import SourceEvents
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import RelayUnreachableError, RemoteProtocolError, ShortageError
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket

MAX_TUNNELS = 100
"""Tunnels of a group. A carrier has 126 sessions for them; some are left for tunnels whose last visitors finish."""
MAX_CARRIERS = 80
"""Carriers of a group: enough for ten thousand visitors, the relay's default limit."""
FIRST_DIAL_DELAY, MAX_DIAL_DELAY = 0.25, 2.0
"""Seconds between attempts to dial. Short, because a dead network answers no attempt and a restart of the relay takes a
second. The session ends the attempts when the tunnel is gone.
"""


class RelayCarriers:
    """All carriers of a process to one relay."""

    def __init__(
        self, engine: Engine, relay: RelayAccess, nursery: trio.Nursery, limits: CarrierLimits | None = None
    ) -> None:
        """`nursery` runs the tasks that dial."""
        self._engine = cast(Pump, engine)
        self._relay = relay
        self._nursery = nursery
        self._limits = limits or CarrierLimits()
        self._groups: list[CarrierGroup] = []

    def join(self, source: CarrierSource) -> CarrierGroup:
        """Give a source a group of the same address with room for it."""
        self._groups = [group for group in self._groups if group.sources]
        address, shared = replace(source.uri, key=""), self._relay.shares_carriers
        for group in self._groups:
            if group.address == address and group.shared and shared and len(group.sources) < MAX_TUNNELS:
                break
        else:
            group = CarrierGroup(self._engine, self._relay, address, self._limits, shared=shared)
            self._groups.append(group)
        group.add(source, self._nursery)
        return group


class CarrierSource(RetiringSource):
    """The connections of one tunnel: its offers on the carriers of a group. Implements `ConnectionSource` and
    `OfferingSource`.
    """

    def __init__(
        self,
        carriers: RelayCarriers,
        uri: Endpoint,
        events: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
    ) -> None:
        """`uri` is the server URI. When `nursery` is cancelled, the tunnel's visitors are dropped. `keep_header`: leave
        the PROXY header in front of the visitor's bytes.
        """
        super().__init__()
        self.uri = uri
        self.visitor_sink = VisitorSink(events.on_visitor, events.on_failure, keep_header)
        self._carriers = carriers
        self._events = events
        self._nursery = nursery
        self._group: CarrierGroup | None = None  # while it has offers, or wants any
        self._offers: dict[Offer, None] = {}
        self._guarded = False  # the task exists that drops the visitors at the end of the exposure

    @property
    def parked(self) -> int:
        """Carriers on which the relay has accepted the tunnel and sends visitors."""
        return sum(offer.accepted and not offer.retired and not offer.over for offer in self._offers)

    def resume(self) -> None:
        """See `ConnectionSource.resume`."""
        self.closed = self.paused = False
        if not self._guarded:
            self._guarded = True
            self._nursery.start_soon(self._guard)
        if self._group is None:
            self._group = self._carriers.join(self)
        else:
            self._group.resume(self)

    def probe(self) -> None:
        """Ping every carrier, and start a running attempt to dial again from the beginning."""
        if self._group is not None:
            self._group.probe()

    @property
    def parts(self) -> Iterable[SourcePart]:
        """See `RetiringSource.parts`: its offers."""
        return self._offers

    def close(self) -> None:
        """See `RetiringSource.close`."""
        super().close()
        self._leave_if_over()

    # Called by the group and the carriers

    def is_on(self, carriers: Collection[AgentCarrier]) -> bool:
        """Whether visitors come, or soon will, on one of these carriers."""
        return any(offer.carrier in carriers and not offer.retired and not offer.over for offer in self._offers)

    def offer_on(self, carrier: AgentCarrier) -> Offer | None:
        """Offer the tunnel on this carrier. Returns None if the carrier has no room for it."""
        offer = carrier.offer(self)
        if offer is not None:
            self._offers[offer] = None
        return offer

    def on_offer_changed(self) -> None:
        """See `OfferingSource.on_offer_changed`."""
        for offer in [offer for offer in self._offers if offer.over and not offer.visitors]:
            del self._offers[offer]
        self.notify_changed()
        self._leave_if_over()

    def on_offer_ended(self, offer: Offer, reason: str) -> None:
        """See `OfferingSource.on_offer_ended`."""
        expected = self.closed or offer.retired
        if not expected and not offer.accepted:
            self.paused = True  # the relay does not know the tunnel: the session checks, then resumes
        if not expected and (not offer.accepted or not self.parked):
            self.on_trouble(reason)
        self.on_offer_changed()

    def on_trouble(self, reason: str) -> None:
        """Tell the session. A bug there ends its exposure alone."""
        try:
            self._events.on_trouble(reason)
        except Exception as error:
            self._events.on_failure(error)

    # Inside

    async def _guard(self) -> None:
        """Drop the visitors when this task is cancelled; it ends with the last offer of a closed source."""
        try:
            while self._offers or not self.closed:
                await self._changed.wait()
        finally:
            self._guarded = False
            self.closed = self.paused = True
            for offer in list(self._offers):
                offer.abort()
            self._offers.clear()
            self._leave_if_over()

    def _leave_if_over(self) -> None:
        if self.closed and not self._offers:
            self._changed.set()
            if self._group is not None:
                group, self._group = self._group, None
                group.remove(self)


class CarrierGroup:
    """Some tunnels, and the carriers that all of them are offered on. Implements `CarrierOwner`."""

    def __init__(
        self, engine: Pump, relay: RelayAccess, address: Endpoint, limits: CarrierLimits, *, shared: bool
    ) -> None:
        """`address` is the tunnels' server URI without a key. `shared`: the relay takes several on a carrier."""
        self.address = address
        self.shared = shared
        self.sources: dict[CarrierSource, None] = {}
        self._engine = engine
        self._relay = relay
        self._limits = limits
        self._carriers: dict[AgentCarrier, None] = {}
        self._wake = trio.Event()
        self._running = False  # the dialling task exists
        self._attempt = trio.CancelScope()  # around one attempt, or the delay before the next
        self._delayed = False  # it is the delay

    def add(self, source: CarrierSource, nursery: trio.Nursery) -> None:
        """One more tunnel, which has not waited for any delay yet. `nursery` is for the task that dials."""
        self.sources[source] = None
        if not self._running:
            self._running = True
            nursery.start_soon(self._run)
        if self._delayed:
            self._attempt.cancel()
        self.resume(source)

    def remove(self, source: CarrierSource) -> None:
        """A tunnel has ended."""
        self.sources.pop(source, None)
        if not self.sources:
            self._attempt.cancel()
        self._wake.set()

    def resume(self, source: CarrierSource) -> None:
        """Offer a tunnel on all carriers."""
        for carrier in list(self._carriers):
            if carrier.accepted and not source.is_on((carrier,)):
                source.offer_on(carrier)
        self._wake.set()

    def probe(self) -> None:
        """See `CarrierSource.probe`."""
        for carrier in list(self._carriers):
            carrier.probe()
        self._attempt.cancel()
        self._wake.set()

    # Called by the carriers, see `CarrierOwner`

    def on_accepted(self, carrier: AgentCarrier) -> None:
        """The first tunnel was accepted: offer the other ones, too."""
        for source in list(self.sources):
            if not source.paused and not source.is_on((carrier,)):
                source.offer_on(carrier)

    def on_carrier_closed(self, carrier: AgentCarrier) -> None:
        """A carrier ended."""
        self._carriers.pop(carrier, None)
        self._wake.set()

    def keep_session(self, tls: TlsSocket) -> None:
        """The relay has answered over this connection: later ones resume its TLS session, which saves most of the
        handshake.
        """
        self._relay.carrier_session = tls.session(self._relay.carrier_session)

    def wake_if_needed(self) -> None:
        """A carrier is nearly full or stopped answering: dial another one if that leaves too few places."""
        self._wake.set()

    # Inside

    @property
    def _answering(self) -> list[AgentCarrier]:
        return [carrier for carrier in self._carriers if carrier.answering]

    def _needs_carrier(self) -> bool:
        """Whether a tunnel is on no carrier that answers and has places left, and the limit allows one more."""
        good = [carrier for carrier in self._carriers if carrier.answering and not carrier.is_nearly_full]
        for source in self.sources:
            if not source.paused and not source.is_on(good):
                return len(self._answering) < MAX_CARRIERS
        return False

    async def _run(self) -> None:
        """Dial whenever a carrier is needed, until the last tunnel and the last carrier are gone."""
        backoff = Backoff(first=FIRST_DIAL_DELAY, longest=MAX_DIAL_DELAY)
        count = 1  # carriers to dial at once
        try:
            while self._carriers or self.sources:
                if not self._needs_carrier():
                    count = 1
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                with trio.CancelScope() as self._attempt:
                    if await self._dial_several(count):
                        count = min(2 * count, MAX_CONCURRENT_DIALS) if self._answering else 1
                        backoff.reset()
                    else:
                        count = 1
                        self._delayed = True
                        await trio.sleep(backoff.next_delay())
                self._delayed = False
        finally:
            self._running = False
            for carrier in list(self._carriers):
                carrier.close()

    async def _dial_several(self, count: int) -> bool:
        """Dial `count` carriers at once, or as many as the limit allows; returns whether the relay accepted all."""
        accepted: list[bool] = []

        async def dial() -> None:
            async with self._relay.dialing:
                accepted.append(await self._dial())

        async with trio.open_nursery() as nursery:
            for _ in range(min(count, MAX_CARRIERS - len(self._answering))):
                nursery.start_soon(dial)
        return all(accepted)

    async def _dial(self) -> bool:
        """Dial one carrier, and offer it one tunnel after another until the relay accepts one; returns whether it did.
        A failure is reported as trouble.
        """
        if all(source.paused for source in self.sources):  # since this was begun
            return False
        try:
            connection = await self._relay.dial_carrier(self.address)
        except (RelayUnreachableError, ShortageError, RemoteProtocolError) as error:
            for source in [source for source in self.sources if not source.paused]:
                source.on_trouble(str(error))
            return False
        try:
            carrier = AgentCarrier(self, self._engine, connection, self._limits, shared=self.shared)
        except OSError:
            connection.close()
            return False
        self._carriers[carrier] = None
        try:
            for source in list(self.sources):
                offer = None if source.paused or carrier.over else source.offer_on(carrier)
                if offer is not None:
                    await offer.decided.wait()
                if carrier.accepted:
                    return True
        except trio.Cancelled:
            carrier.is_attended = False
            raise
        carrier.close()
        return False
