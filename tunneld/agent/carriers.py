"""The carriers of one tunnel: connections to the relay's shared port, each of which brings up to 126 visitors.

    task       dials while none stands that answers and has places left; rests otherwise. It ends with the last carrier;
               cancelled, it takes them all along
    carrier    told the server URI, then asked for a sign of life: whoever answers has taken us
    visitor    a channel that the relay opened: its PROXY header is read, then it is handed over

The relay gives a visitor to the carrier that has the fewest. Another one is dialled when that has few places left. A
crowd fills the new one before we hear that it is taken; then two more are dialled, then four, and so on: thousands who
wait must not wait for a round trip per hundred of them.

A carrier that falls silent is not given up: another one is dialled beside it. The relay prefers the one that answers,
and if the silence was a short one, nobody has lost anything. The tunnel at the relay outlives all of its carriers for a
while, so none of this needs the control connection; where the relay has forgotten the tunnel, carriers end unanswered,
which is *trouble*, and the keeper asks.
"""

from __future__ import annotations

import random
import socket
from dataclasses import replace
from typing import cast

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.backoff import delays
from tunneld.agent.end_visitor import EndVisitor, VisitorSink
from tunneld.agent.network import is_ours
from tunneld.agent.source import MAX_DIALS_AT_ONCE, SourceEvents
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.errors import RelayUnreachableError, RemoteProtocolError
from tunneld.mux.carrier import MAX_CHANNELS, Carrier
from tunneld.mux.channel import Channel
from tunneld.mux.connection import connection_over
from tunneld.mux.limits import CarrierLimits
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket

MAX_CARRIERS = 80
"""Carriers of one tunnel: ten thousand visitors, which is what a relay takes unless told otherwise."""
NEARLY_FULL = MAX_CHANNELS * 3 // 4
"""Channels of a carrier. When each has so many, another one is dialled, before a visitor has to wait."""
FIRST, LONGEST = 0.25, 2.0
"""Seconds between attempts to dial: short, since a silent network answers no attempt and a relay's own restart is over
in a second; the tunnel, and thereby the reason to try, ends when the keeper says so.
"""


class Carriers:
    """See `Supply`."""

    description = "carriers"
    size = 0

    def __init__(
        self,
        engine: Engine,
        relay: RelayAccess,
        uri: Endpoint,
        owner: SourceEvents,
        nursery: trio.Nursery,
        *,
        keep_header: bool,
        limits: CarrierLimits | None = None,
    ) -> None:
        """`uri` is the server URI; `nursery` owns the task that dials. `keep_header`: leave it in front of what the
        visitor says.
        """
        self.visitors = VisitorSink(owner.on_visitor, owner.on_failure, keep_header)  # who takes them
        self.closed = False  # carriers end with their last visitor
        self._engine = cast(Pump, engine)
        self._relay = relay
        self._uri = uri
        self._owner = owner
        self._limits = limits or CarrierLimits()
        self._lines: dict[_AgentCarrier, None] = {}
        self._nursery = nursery
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._resting = True
        self._running = False  # there is a task
        self._attempt = trio.CancelScope()  # of what that task does now: one attempt, or the wait until the next

    @property
    def parked(self) -> int:
        """Carriers that the relay has taken."""
        return sum(line.taken and not line.retired for line in self._lines)

    def resume(self) -> None:
        """See `Supply.resume`."""
        self.closed = self._resting = False
        self._wake.set()
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    def pause(self) -> None:
        """See `Supply.rest`: visitors still come on the carriers that stand."""
        self._resting = True

    def resize(self) -> bool:
        """Nothing is parked."""
        return False

    def probe(self) -> None:
        """See `Supply.doubt`: every carrier is asked, and an attempt from before that begins anew."""
        for line in self._lines:
            line.probe()
        self._attempt.cancel()
        self.stirred()

    def close(self) -> None:
        """Be called by nobody new: carriers end with the last visitor that they serve."""
        self.closed = self._resting = True
        self._attempt.cancel()
        self._wake.set()
        for line in list(self._lines):
            line.retire()

    def withdraw(self) -> None:
        """See `Supply.withdraw`."""
        self.close()

    async def wait_withdrawn(self) -> None:
        """See `Supply.wait_withdrawn`."""
        while not all(line.confirmed for line in self._lines):
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """See `Supply.wait_gone`."""
        while self._lines:
            await self._changed.wait()

    # What its carriers report

    def stirred(self) -> None:
        """A carrier is nearly full or fell silent: is another one needed?"""
        if not self._resting and self._lacks():
            self._wake.set()

    def lost(self, line: _AgentCarrier, reason: str) -> None:
        """A carrier ended."""
        self._lines.pop(line, None)
        self.tell_changed()
        if not self.closed and not line.retired:
            if not line.taken:
                self._resting = True  # the relay does not know us: the keeper asks, and says when to go on
                self._owner.on_unknown_tunnel()
            if not line.taken or not self._lines:
                self._owner.on_trouble(reason)
        self._wake.set()

    def tell_changed(self) -> None:
        """A carrier ended, or the relay knows that it is to end."""
        self._changed.set()
        self._changed = trio.Event()

    # Inside

    async def _run(self) -> None:
        """Dial whenever it is needed, until `close` and the end of the last carrier."""
        waits = delays(random.random, first=FIRST, longest=LONGEST)
        count = 1  # to dial at once
        try:
            while self._lines or not self.closed:
                if self._resting or not self._lacks():
                    count = 1
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                with trio.CancelScope() as self._attempt:
                    if await self._dial_several(count):
                        count = min(2 * count, MAX_DIALS_AT_ONCE) if self._answering else 1
                        waits = delays(random.random, first=FIRST, longest=LONGEST)
                    else:
                        count = 1
                        await trio.sleep(next(waits))
        finally:
            self._running = False
            self.closed = True
            for line in list(self._lines):
                line.cut()

    def _lacks(self) -> bool:
        """Whether no carrier answers and has places left, and there may be one more."""
        answering = self._answering
        return len(answering) < MAX_CARRIERS and all(line.channels >= NEARLY_FULL for line in answering)

    @property
    def _answering(self) -> list[_AgentCarrier]:
        return [line for line in self._lines if line.answering and not line.retired]

    async def _dial_several(self, count: int) -> bool:
        """So many more carriers at once, as far as there may be; whether the relay has taken each of them."""
        taken: list[bool] = []

        async def dial() -> None:
            line = await self._dial()
            taken.append(line is not None and await line.is_taken())

        async with trio.open_nursery() as nursery:
            for _ in range(min(count, MAX_CARRIERS - len(self._answering))):
                nursery.start_soon(dial)
        return all(taken)

    async def _dial(self) -> _AgentCarrier | None:
        """One more carrier; None where that failed, which is told."""
        try:
            connection = await self._relay.dial_carrier(self._uri)
        except (RelayUnreachableError, RemoteProtocolError) as error:
            self._owner.on_trouble(str(error))
            return None
        if self.closed:  # when all was done, which cancels nothing any more
            connection.close()
            return None
        try:
            line = _AgentCarrier(self, self._engine, connection, self._limits)
        except OSError:
            connection.close()
            return None
        self._lines[line] = None
        line.introduce(self._uri)
        return line


class _AgentCarrier:
    """One carrier, and its owner. See `session.Owner`."""

    def __init__(
        self, carriers: Carriers, engine: Pump, connection: socket.socket | TlsSocket, limits: CarrierLimits
    ) -> None:
        self.taken = False
        self.retired = False  # it ends with the last visitor that it serves
        self.confirmed = False  # and the relay knows
        self._farewell = ""
        self._decided = trio.Event()
        self._carriers = carriers
        link = connection_over(connection)
        self._address = link.connection.getsockname()
        self._cut_off = False  # its own address is none of this machine's
        self._carrier = Carrier(engine, link, self, initiator=True, limits=limits)

    @property
    def answering(self) -> bool:
        return self._carrier.answering and not self._cut_off

    @property
    def channels(self) -> int:
        return len(self._carrier.channels)

    def introduce(self, uri: Endpoint) -> None:
        """Say who we are, then ask for an answer: it comes behind whatever the relay thinks of that."""
        self._farewell = str(replace(uri, key=""))
        self._carrier.define_endpoint(str(uri))
        self._carrier.heartbeat.ping_now()

    async def is_taken(self) -> bool:
        """Wait until the relay has taken this carrier, or it is gone."""
        await self._decided.wait()
        return self.taken

    def probe(self) -> None:
        """Is anybody there? The answer takes back what is assumed here."""
        self._cut_off = not is_ours(self._address)
        self._carrier.heartbeat.ping_now()

    def retire(self) -> None:
        """Say that we are to be called no more. Visitors that were on their way are here before the answer is."""
        if not self.retired:
            self.retired = True
            self._carrier.define_endpoint(self._farewell)
            self._carrier.request_ack()

    def cut(self) -> None:
        """End, and so does every visitor on it."""
        self._carrier.close("the agent stopped")

    # What the carrier reports

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """A visitor; who it is comes first."""
        channel.accept()
        channel.handler = EndVisitor(channel, self._carriers.visitors)
        if len(self._carrier.channels) >= NEARLY_FULL:
            self._carriers.stirred()

    def on_endpoint(self, uri: str | None) -> None:
        """We call nobody back."""

    def on_capacity(self) -> None:
        """A visitor left. Of the last one the relay shall have read everything before the carrier ends."""
        if self.retired and not self._carrier.channels:
            self._carrier.request_ack()

    def on_pong(self) -> None:
        """The relay has read what we said, who we are or that we go, and has not hung up."""
        self.taken = True
        self._cut_off = False
        self._decided.set()
        if self.retired:
            self.confirmed = True
            self._carriers.tell_changed()
            if not self._carrier.channels:
                self._carrier.close()

    def on_unresponsive(self) -> None:
        self._carriers.stirred()

    def on_closed(self, reason: str) -> None:
        self._decided.set()
        self._carriers.lost(self, reason)
