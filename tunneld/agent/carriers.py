"""The carriers of one tunnel: connections to the relay's shared port, each of which carries up to 126 visitors.

    task       dials while no carrier answers and has places left, else sleeps. It ends with the last carrier;
               cancelling it closes all of them
    carrier    sends the server URI, then a ping: the pong proves that the relay accepted it
    visitor    a channel that the relay opened: its PROXY header is read, then the channel is handed over

The relay gives each visitor to the carrier with the fewest. Another carrier is dialled when the existing ones are
nearly full. A crowd fills the new one before the agent learns that it was accepted; then two more are dialled, then
four, and so on, so that thousands of waiting visitors do not wait a round trip per hundred of them.

A carrier that stops answering is not dropped; another one is dialled beside it. The relay prefers the one that answers,
and if the silence was short, nothing is lost. At the relay the tunnel outlives its carriers for a while, so none of
this needs the control connection. If the relay has forgotten the tunnel, carriers end before a pong. That is *trouble*:
dialling pauses until the session has checked the tunnel. Without a control connection it pauses after the first
failure: the relay is gone, and the control connection alone looks for it.

Each tunnel has carriers of its own. All tunnels of a process at one relay could share them, since WebMUX defines any
number of endpoints on a connection. What that takes, and is not done: the agent defines one endpoint for each key; the
relay answers each, since closing the connection, with which it refuses a key today, would end the other tunnels; and a
visitor's channel names its tunnel, by the protocol id of the atom with which the agent defined the endpoint (0x20000 +
index, 256 on a connection). The greeting of the control connection announces it, as it does `opens=described`. The
relay must divide a carrier's turns, its unsent bytes and its 126 channels among the tunnels on it, end one of them with
a message where it closes the connection now, and withdraw and drain by endpoint. A pool per relay then replaces this
class, and a source per tunnel remains.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import cast

import trio

from tunneld.agent.access import MAX_CONCURRENT_DIALS, RelayAccess
from tunneld.agent.backoff import Backoff
from tunneld.agent.end_visitor import EndVisitor, VisitorSink
from tunneld.agent.network import is_local_address
from tunneld.agent.source import SourceEvents
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import RelayUnreachableError, RemoteProtocolError, ShortageError
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket

MAX_CARRIERS = 80
"""Carriers of one tunnel: enough for ten thousand visitors, the relay's default limit."""
NEARLY_FULL_CHANNELS = MAX_CHANNELS * 3 // 4
"""Open channels from which a carrier counts as nearly full. When all are, another one is dialled before visitors have
to wait.
"""
FIRST_DIAL_DELAY, MAX_DIAL_DELAY = 0.25, 2.0
"""Seconds between attempts to dial. Short, because a dead network answers no attempt and a restart of the relay takes a
second. The session ends the attempts when the tunnel is gone.
"""


class Carriers:
    """The carriers of one tunnel. Implements `ConnectionSource`."""

    size = 0

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        uri: Endpoint,
        events: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
        limits: CarrierLimits | None = None,
    ) -> None:
        """`uri` is the server URI; `nursery` runs the task that dials. `keep_header`: leave the PROXY header in front
        of the visitor's bytes.
        """
        self.visitor_sink = VisitorSink(events.on_visitor, events.on_failure, keep_header)
        self.closed = False  # no new carriers; each one ends with its last visitor
        self._engine = cast(Pump, engine)
        self._relay = relay
        self._uri = uri
        self._events = events
        self._limits = limits or CarrierLimits()
        self._carriers: dict[_AgentCarrier, None] = {}
        self._nursery = nursery
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._paused = True
        self._running = False  # the dialling task exists
        self._attempt = trio.CancelScope()  # around one attempt, or the delay before the next

    @property
    def parked(self) -> int:
        """Carriers that the relay has accepted and that take visitors."""
        return sum(carrier.accepted and not carrier.retired for carrier in self._carriers)

    def resume(self) -> None:
        """See `ConnectionSource.resume`."""
        self.closed = self._paused = False
        self._wake.set()
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    def pause(self) -> None:
        """See `ConnectionSource.pause`: the existing carriers still take visitors."""
        self._paused = True

    def resize(self) -> bool:
        """Return False: no connection is parked at the relay."""
        return False

    def probe(self) -> None:
        """Ping every carrier, and start a running attempt to dial again from the beginning."""
        for carrier in self._carriers:
            carrier.probe()
        self._attempt.cancel()
        self.wake_if_needed()

    def close(self) -> None:
        """Take no new visitors: each carrier ends with the last visitor on it."""
        self.closed = self._paused = True
        self._attempt.cancel()
        self._wake.set()
        for carrier in list(self._carriers):
            carrier.retire()

    def withdraw(self) -> None:
        """See `ConnectionSource.withdraw`."""
        self.close()

    async def wait_withdrawn(self) -> None:
        """See `ConnectionSource.wait_withdrawn`."""
        while not all(carrier.confirmed for carrier in self._carriers):
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """See `ConnectionSource.wait_closed`."""
        while self._carriers:
            await self._changed.wait()

    # Called by the carriers

    def wake_if_needed(self) -> None:
        """A carrier is nearly full or stopped answering: dial another one if that leaves too few places."""
        if not self._paused and self._needs_carrier():
            self._wake.set()

    def on_carrier_closed(self, carrier: _AgentCarrier, reason: str) -> None:
        """A carrier ended."""
        self._carriers.pop(carrier, None)
        self.notify_changed()
        if not self.closed and not carrier.retired:
            if not carrier.accepted:
                self._paused = True  # the relay does not know the tunnel: the session checks, then resumes
            if not carrier.accepted or not self._carriers:
                self._events.on_trouble(f"connection to the relay lost: {reason}")
        self._wake.set()

    def keep_session(self, tls: TlsSocket) -> None:
        """The relay has answered over this connection: later ones resume its TLS session, which saves most of the
        handshake.
        """
        self._relay.carrier_session = tls.session(self._relay.carrier_session)

    def notify_changed(self) -> None:
        """A carrier ended, or the relay confirmed that it is to end: wake the waiting tasks."""
        self._changed.set()
        self._changed = trio.Event()

    # Inside

    async def _run(self) -> None:
        """Dial whenever a carrier is needed, until `close` and the end of the last carrier."""
        backoff = Backoff(first=FIRST_DIAL_DELAY, longest=MAX_DIAL_DELAY)
        count = 1  # carriers to dial at once
        try:
            while self._carriers or not self.closed:
                if self._paused or not self._needs_carrier():
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
                        await trio.sleep(backoff.next_delay())
        finally:
            self._running = False
            self.closed = True
            for carrier in list(self._carriers):
                carrier.close()

    def _needs_carrier(self) -> bool:
        """Whether every carrier that answers is nearly full, and the limit allows one more."""
        answering = self._answering
        full = all(carrier.channel_count >= NEARLY_FULL_CHANNELS for carrier in answering)
        return full and len(answering) < MAX_CARRIERS

    @property
    def _answering(self) -> list[_AgentCarrier]:
        return [carrier for carrier in self._carriers if carrier.answering and not carrier.retired]

    async def _dial_several(self, count: int) -> bool:
        """Dial `count` carriers at once, or as many as the limit allows; returns whether the relay accepted all."""
        accepted: list[bool] = []

        async def dial() -> None:
            async with self._relay.dialing:
                carrier = await self._dial() if not self._paused else None
                accepted.append(carrier is not None and await carrier.wait_accepted())

        async with trio.open_nursery() as nursery:
            for _ in range(min(count, MAX_CARRIERS - len(self._answering))):
                nursery.start_soon(dial)
        return all(accepted)

    async def _dial(self) -> _AgentCarrier | None:
        """Dial one carrier. Returns None after a failure, which is reported as trouble."""
        try:
            connection = await self._relay.dial_carrier(self._uri)
        except (RelayUnreachableError, ShortageError, RemoteProtocolError) as error:
            self._events.on_trouble(str(error))
            return None
        if self.closed:  # at the moment in which the dial succeeded: too late to cancel it
            connection.close()
            return None
        try:
            carrier = _AgentCarrier(self, self._engine, connection, self._limits)
        except OSError:
            connection.close()
            return None
        self._carriers[carrier] = None
        carrier.send_uri(self._uri)
        return carrier


class _AgentCarrier:
    """The agent's side of one carrier. Implements `CarrierEvents`."""

    def __init__(
        self, carriers: Carriers, engine: Pump, connection: socket.socket | TlsSocket, limits: CarrierLimits
    ) -> None:
        self.accepted = False  # by the relay
        self.retired = False  # takes no new visitors, and ends with the last one on it
        self.confirmed = False  # the relay knows that it is retired
        self._uri_without_key = ""
        self._decided = trio.Event()  # accepted, or closed
        self._carriers = carriers
        self._new_tls = connection if isinstance(connection, TlsSocket) else None  # until the relay has answered
        muxed = connection_over(connection)
        self._address = muxed.connection.getsockname()
        self._address_lost = False  # this machine no longer has that address
        self._carrier = Carrier(engine, muxed, self, initiator=True, limits=limits)

    @property
    def answering(self) -> bool:
        return self._carrier.answering and not self._address_lost

    @property
    def channel_count(self) -> int:
        return len(self._carrier.channels)

    def send_uri(self, uri: Endpoint) -> None:
        """Send the server URI, then a ping. The relay answers the ping after it has judged the URI."""
        self._uri_without_key = str(replace(uri, key=""))
        self._carrier.define_endpoint(str(uri))
        self._carrier.heartbeat.ping_now()

    async def wait_accepted(self) -> bool:
        """Wait until the relay accepted or closed this carrier; returns which."""
        await self._decided.wait()
        return self.accepted

    def probe(self) -> None:
        """Ping the relay, and count as not answering until the pong if this machine lost the carrier's address."""
        self._address_lost = not is_local_address(self._address)
        self._carrier.heartbeat.ping_now()

    def retire(self) -> None:
        """Ask the relay for no more visitors. Visitors that it sent before it read this arrive before its pong."""
        if not self.retired:
            self.retired = True
            self._carrier.define_endpoint(self._uri_without_key)
            self._carrier.request_ack()

    def close(self) -> None:
        """Close the carrier and with it every visitor on it."""
        self._carrier.close("the agent stopped")

    # Called by the carrier

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The relay opened a channel for a visitor; its PROXY header comes first."""
        channel.accept()
        channel.handler = EndVisitor(channel, self._carriers.visitor_sink)
        if len(self._carrier.channels) >= NEARLY_FULL_CHANNELS:
            self._carriers.wake_if_needed()

    def on_endpoint(self, uri: str | None) -> None:
        """Ignore the relay's URI: an agent opens no channels."""

    def on_capacity(self) -> None:
        """A visitor left. Before a retired carrier closes, the relay must have read everything of the last one."""
        if self.retired and not self._carrier.channels:
            self._carrier.request_ack()

    def on_pong(self) -> None:
        """The relay has read everything that was sent, the URI included, and did not close the carrier."""
        self.accepted = True
        self._address_lost = False
        if self._new_tls is not None:
            self._carriers.keep_session(self._new_tls)
            self._new_tls = None
        self._decided.set()
        if self.retired:
            self.confirmed = True
            self._carriers.notify_changed()
            if not self._carrier.channels:
                self._carrier.close()

    def on_unresponsive(self) -> None:
        self._carriers.wake_if_needed()

    def on_closed(self, reason: str) -> None:
        self._decided.set()
        self._carriers.on_carrier_closed(self, reason)
