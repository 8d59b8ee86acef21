"""One carrier of the agent: a connection to the relay's shared port, for the visitors of one tunnel or of several.

    tunnel     a session that the agent opens, with the server URI as an atom: while it is open, visitors come. The
               relay refuses it, or ends it later, by a reset with the reason. A ping behind it shows that the relay
               accepted it
    visitor    a channel that the relay opens, with the same atom: its PROXY header is read, then it is handed over

The first tunnel is sent alone, because a relay reads little before it has seen a key; if it is refused, another one is.

A relay of an earlier version takes one tunnel on a carrier: its server URI is defined as an endpoint, and visitors'
channels name the public port. An endpoint without a key ends it.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from itertools import cycle
from typing import Protocol

import trio

from tunneld.agent.end_visitor import EndVisitor, VisitorSink
from tunneld.agent.network import is_local_address
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, reason_of
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket
from tunneld.wire.webmux.header import ATOMS, FIRST_ATOM

NEARLY_FULL_CHANNELS = MAX_CHANNELS * 3 // 4
"""Visitors from which a carrier counts as nearly full. When all are, another one is dialled before visitors have to
wait.
"""
STOPPED = "the agent stopped"
UNKNOWN_TUNNEL = "the agent has no such tunnel"


class OfferingSource(Protocol):
    """The source of one tunnel's connections, as carriers call it."""

    uri: Endpoint
    """The server URI."""
    visitor_sink: VisitorSink
    """Gets the visitors."""

    def on_offer_changed(self) -> None:
        """The relay accepted the tunnel on a carrier, or knows that no more visitors are wanted there."""

    def on_offer_ended(self, offer: Offer, reason: str) -> None:
        """The tunnel is no longer on that carrier: it was lost, or the relay refused or ended it there."""


class CarrierOwner(Protocol):
    """The owner of some carriers, as they call it."""

    def on_accepted(self, carrier: AgentCarrier) -> None:
        """The relay accepted the first tunnel on a carrier."""

    def on_carrier_closed(self, carrier: AgentCarrier) -> None:
        """A carrier ended; its tunnels have been told."""

    def keep_session(self, tls: TlsSocket) -> None:
        """The relay has answered over this connection: later ones can resume its TLS session."""

    def wake_if_needed(self) -> None:
        """A carrier is nearly full or stopped answering."""


class Offer:
    """One tunnel on one carrier. Implements `EndHandler` for the session that stands for it."""

    __slots__ = (
        "accepted", "carrier", "confirmed", "decided", "over", "protocol", "retired", "session", "sink", "source",
        "visitors",
    )  # fmt: skip

    def __init__(self, carrier: AgentCarrier, source: OfferingSource, protocol: int, session: Channel | None) -> None:
        """`session` is None where the carrier has one tunnel."""
        self.carrier = carrier
        self.source = source
        self.sink = source.visitor_sink
        self.protocol = protocol
        self.session = session
        self.visitors: dict[int, Channel] = {}  # by session id
        self.accepted = False  # by the relay
        self.retired = False  # takes no new visitors, and ends with the last one
        self.confirmed = False  # the relay knows that it is retired
        self.over = False
        self.decided = trio.Event()  # accepted, or over

    def retire(self) -> None:
        """Ask the relay for no more visitors. Visitors that it sent before it read this arrive before its pong."""
        if not self.retired and not self.over:
            self.retired = True
            self.carrier.send_retirement(self)

    def abort(self) -> None:
        """Drop the tunnel on this carrier, with its visitors, and tell the relay."""
        for channel in list(self.visitors.values()):
            channel.reset(STOPPED)
        self.carrier.end_offer(self)
        if self.session is not None:
            self.session.reset(STOPPED)
        self.source.on_offer_changed()
        self.carrier.close_if_unused()

    # As the handler of its session

    def on_data(self, data: memoryview) -> int:
        """Ignore it: the session carries no data."""
        return len(data)

    def on_writable(self) -> None:
        """Nothing: nothing is sent on it."""

    def on_eof(self) -> None:
        """The relay has no more visitors for it, as it was asked."""
        if self.session is not None:
            self.session.finish()
        self._end("the relay sends no more visitors on this connection")

    def on_write_failed(self, _error: OSError) -> None:
        """Nothing: nothing is sent on it."""

    def on_reset(self, error: OSError) -> None:
        """The relay refused the tunnel, or ended it, and says why; or the carrier is lost, which it reports itself."""
        if self.carrier.over:
            return
        reason = reason_of(error)
        if self.accepted:
            self._end(f"connection to the relay lost: {reason}")
        else:
            self._end(f"the relay refused the connection: {reason.partition(' ')[2] or reason}")  # behind the code

    def on_internal_error(self, error: Exception) -> None:
        """A callback above raised: a bug."""
        self.sink.on_failure(error)

    def _end(self, reason: str) -> None:
        self.carrier.end_offer(self)
        self.source.on_offer_ended(self, reason)
        self.carrier.close_if_unused()


class AgentCarrier:
    """The agent's side of one carrier. Implements `CarrierEvents`."""

    def __init__(
        self,
        owner: CarrierOwner,
        engine: Pump,
        connection: socket.socket | TlsSocket,
        limits: CarrierLimits,
        *,
        shared: bool,
    ) -> None:
        """`shared`: the relay takes several tunnels on it. Raises OSError if the connection is closed already."""
        self.accepted = False  # by the relay, with at least one tunnel
        self.is_attended = True  # until then a task offers one tunnel after another
        self.offers: dict[int, Offer] = {}  # by protocol id; one that is over stays until its session is
        self.visitors: dict[int, Offer] = {}  # by session id
        self._owner = owner
        self._shared = shared
        self._indices = cycle(range(ATOMS))  # of atoms: one is used again as late as possible
        self._new_tls = connection if isinstance(connection, TlsSocket) else None  # until the relay has answered
        muxed = connection_over(connection)
        self._address = muxed.connection.getsockname()
        self._address_lost = False  # this machine no longer has that address
        self._carrier = Carrier(engine, muxed, self, initiator=True, limits=limits)

    @property
    def over(self) -> bool:
        """Whether it is closed."""
        return self._carrier.over

    @property
    def answering(self) -> bool:
        """Whether the relay answers, as far as is known."""
        return self._carrier.answering and not self._address_lost

    @property
    def is_nearly_full(self) -> bool:
        """Whether there should be another one."""
        return len(self.visitors) >= NEARLY_FULL_CHANNELS

    def offer(self, source: OfferingSource) -> Offer | None:
        """Offer a tunnel to the relay, then ping it: the pong comes after it has judged the tunnel. Returns None if the
        carrier has as many as it can.
        """
        carrier = self._carrier
        if not self._shared:
            offer = Offer(self, source, 0, None)
            carrier.define_endpoint(str(source.uri))
            carrier.heartbeat.ping_now()
        else:
            if not carrier.can_open:  # it has fewer sessions than atoms
                return None
            while (index := next(self._indices)) + FIRST_ATOM in self.offers:
                pass
            protocol = carrier.mux.intern_atom(index, str(source.uri))
            try:
                session = carrier.open(protocol)
            except LimitReachedError:
                return None
            session.handler = offer = Offer(self, source, protocol, session)
            carrier.request_ack()
        self.offers[offer.protocol] = offer
        return offer

    def send_retirement(self, offer: Offer) -> None:
        """Tell the relay that a tunnel wants no more visitors here, then ping it."""
        if offer.session is None:
            self._carrier.define_endpoint(str(replace(offer.source.uri, key="")))
        else:
            offer.session.finish()
        self._carrier.request_ack()

    def probe(self) -> None:
        """Ping the relay, and count as not answering until the pong if this machine lost the carrier's address."""
        self._address_lost = not is_local_address(self._address)
        self._carrier.heartbeat.ping_now()

    def end_offer(self, offer: Offer) -> None:
        """A tunnel is no longer on this carrier. Its visitors, if there are any, go on."""
        if not offer.over:
            offer.over = True
            offer.decided.set()
            del self.offers[offer.protocol]

    def close_if_unused(self) -> None:
        """Close the carrier if it has neither tunnels nor visitors."""
        if not self.offers and not self.visitors and (self.accepted or not self.is_attended):
            self._carrier.close()

    def close(self) -> None:
        """Close the carrier and with it every visitor on it."""
        self._carrier.close(STOPPED)

    # Called by the carrier

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The relay opened a channel for a visitor; its PROXY header comes first."""
        offer = self.offers.get(protocol if self._shared else 0)
        if offer is None:
            channel.reset(UNKNOWN_TUNNEL)
            return
        channel.accept()
        channel.handler = EndVisitor(channel, offer.sink)
        offer.visitors[channel.sid] = channel
        self.visitors[channel.sid] = offer
        if len(self.visitors) >= NEARLY_FULL_CHANNELS:
            self._owner.wake_if_needed()

    def on_endpoint(self, uri: str | None) -> None:
        """Ignore the relay's URI: an agent opens no channels for it."""

    def on_capacity(self) -> None:
        """Nothing: the agent opens sessions only when it has a tunnel to offer."""

    def on_over(self, channel: Channel) -> None:
        """A visitor left. Before the carrier of one tunnel closes, the relay must have read everything of the last."""
        offer = self.visitors.pop(channel.sid, None)
        if offer is None:
            return
        del offer.visitors[channel.sid]
        if offer.visitors:
            return
        if offer.over:
            offer.source.on_offer_changed()
            self.close_if_unused()
        elif offer.retired and offer.session is None:
            self._carrier.request_ack()

    def on_pong(self) -> None:
        """The relay has read everything that was sent up to the last call of `request_ack`, each tunnel included."""
        self._address_lost = False
        for offer in list(self.offers.values()):
            if not offer.accepted or (offer.retired and not offer.confirmed):
                offer.accepted, offer.confirmed = True, offer.retired
                offer.decided.set()
                offer.source.on_offer_changed()
            if offer.session is None and offer.retired and not offer.visitors:
                self._carrier.close()
                return
        if self._new_tls is not None:
            self._owner.keep_session(self._new_tls)
            self._new_tls = None
        if not self.accepted and self.offers:
            self.accepted = True
            self._owner.on_accepted(self)

    def on_unresponsive(self) -> None:
        """The relay did not reply to a ping."""
        self._owner.wake_if_needed()

    def on_closed(self, reason: str) -> None:
        """The carrier was closed or lost, and its visitors have been reset."""
        offers = dict.fromkeys([*self.offers.values(), *self.visitors.values()])
        self.visitors.clear()
        for offer in offers:
            offer.visitors.clear()
            self.end_offer(offer)
        self._owner.on_carrier_closed(self)
        for offer in offers:
            offer.source.on_offer_ended(offer, f"connection to the relay lost: {reason}")
