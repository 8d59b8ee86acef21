"""A carrier: one connection with many channels, and no task for any of them.

    epoll ──► on_event ──► codec ──► Channel.feed ──► the visitor's socket, at once
    visitor's socket ──► relay ──► Channel.write ──► codec ──► `outgoing` ──► one write after the batch

One place writes, see `send_buffer`; while much output is pending there, visitors are not read. The kernel is kept from
queueing much more than it can send, since no frame can overtake what is queued there.

Reading never waits for writing: the codec bounds the answers that a peer can cause, credit bounds everything else, and
credit is granted only for bytes that a channel's handler has taken.
"""

from __future__ import annotations

from typing import Final

from tunneld.engine.events import READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, RemoteProtocolError, reason_of
from tunneld.log import Logger
from tunneld.mux.channel import CarrierEvents, Channel
from tunneld.mux.channel_table import ChannelTable
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import MAX_FRAMES_PER_TURN, PREAUTH_LIMIT, USER_TIMEOUT_HEARTBEATS, CarrierLimits
from tunneld.mux.ping import PING_PROTOCOL, PingSession
from tunneld.mux.send_buffer import SendBuffer
from tunneld.mux.transport import CarrierTransport
from tunneld.mux.turns import CarrierTurns
from tunneld.mux.webmux_channel import WebMuxChannel
from tunneld.mux.window import ReceiveWindow, WindowBudget
from tunneld.net.endpoint import Peer
from tunneld.wire.webmux.events import (
    Accepted,
    Broken,
    CreditAdded,
    EndpointDefined,
    Event,
    Finished,
    MssSet,
    Opened,
    Reset,
    SessionRefused,
)
from tunneld.wire.webmux.mux import Mux

MAX_CHANNELS = 126
"""Channels that one side may have open: of its 127 session ids one is kept for the ping."""
PREAUTH_EXCEEDED: Final = f"the peer sent more than {PREAUTH_LIMIT} bytes without naming a tunnel"
NO_DATA: Final = memoryview(b"")
NO_MSS: Final = 1 << 30

log = Logger("mux")


class Carrier:
    """One connection that carries channels. Implements `CarrierInput`."""

    def __init__(
        self,
        pump: Pump,
        connection: CarrierTransport,
        owner: CarrierEvents,
        *,
        initiator: bool,
        limits: CarrierLimits,
        authenticated: bool = True,
    ) -> None:
        """Start to serve `connection` and own it; `initiator` is whether we dialled it. An unauthenticated peer may
        send `PREAUTH_LIMIT` bytes until `mark_authenticated`. Raises OSError if the connection is closed already.
        """
        self.pump = pump
        self.limits = limits
        self.mux = Mux(initiator=initiator)
        self.over = False
        self.owner = owner
        self._connection = connection
        self._view = memoryview(pump.wide_buffer)
        self._budget = WindowBudget(limits.window_budget, pump.now, connection.round_trip)
        self.max_fragment = NO_MSS  # bytes of a fragment, by the peer's MSS
        self.turns = CarrierTurns(pump.budget, self._read, self.on_failure)
        self._table = ChannelTable(self.turns, 0 if initiator else 1, self._on_removed)
        self.channels = self._table.channels
        self.send_buffer = SendBuffer(pump, connection, self.mux.outgoing, limits, self._close)
        self.schedule_flush = self.send_buffer.schedule_flush
        self._until_eagain = False  # a short read no longer means that the socket is drained
        self._authenticated = authenticated
        self._preauth_bytes = 0  # received while unauthenticated
        self._ping = PingSession(self.mux)
        connection.keep_unsent_below(limits.max_unsent)
        connection.limit_retransmission(limits.max_rto, USER_TIMEOUT_HEARTBEATS * limits.heartbeat)
        self.mux.set_default_credit(limits.initial_window)
        connection.attach(pump, self)
        self.heartbeat = Heartbeat(self, limits, pump.timers, connection.idle_seconds)
        self.schedule_flush()

    # Called by the owner

    @property
    def can_open(self) -> bool:
        """Whether `open` would succeed."""
        return not self.over and self._table.opened < MAX_CHANNELS and self.mux.can_open

    @property
    def answering(self) -> bool:
        """Whether the peer is responsive, as far as is known."""
        return self.heartbeat.received or not self.heartbeat.unresponsive

    @property
    def channels_left(self) -> int:
        """How many more channels could be opened, approximately."""
        return 0 if self.over else MAX_CHANNELS - self._table.opened

    def open(self, protocol: int) -> Channel:
        """Open a channel; the caller sets its handler or joins it. Raises `LimitReachedError` unless `can_open`."""
        if self.over or self._table.opened >= MAX_CHANNELS:
            raise LimitReachedError("could not open a channel: all ids of the carrier are in use")
        channel = self._add(self.mux.open(protocol))  # which raises it where the peer may still use all free ids
        self.schedule_flush()
        if self.over:
            raise LimitReachedError("could not open a channel: the carrier was lost")
        self.heartbeat.expect_reply()
        return channel

    def mark_authenticated(self) -> None:
        """Lift the pre-authentication byte limit."""
        self._authenticated = True

    def define_endpoint(self, uri: str) -> None:
        """Announce that we can be called back at `uri` (InternAtom, DefineEndpoint)."""
        self.mux.define_endpoint(self.mux.intern_atom(0, uri))
        self.schedule_flush()

    def request_ack(self) -> None:
        """Have `CarrierEvents.on_pong` called once the peer has read everything sent so far."""
        self._ping.repeat = self._ping.outstanding
        self.send_ping()

    def close(self, reason: str = "closed") -> None:
        """Close the connection and every channel on it. Harmless when repeated."""
        self._close(reason)
        self.pump.timers.wake_soon()

    # Called by channels, see `ChannelTransport`

    def accept(self, channel: Channel) -> None:
        """Send SYN."""
        self.mux.accept(channel.sid)
        self.schedule_flush()

    def set_originator(self, channel: Channel, visitor: Peer | None) -> None:
        """Does nothing: WebMUX has no message for it."""

    def write(self, sid: int, data: memoryview) -> int:
        """See `ChannelTransport`."""
        sent = self.mux.send(sid, data)
        self.turns.share.use(1 + sent // self.max_fragment)
        self.schedule_flush()
        return sent

    def grant_credit(self, sid: int, size: int) -> None:
        """Send AddCredit."""
        self.mux.grant(sid, size)
        self.schedule_flush()

    def finish(self, channel: Channel) -> None:
        """Send FIN."""
        self.mux.finish(channel.sid)
        self.schedule_flush()
        if channel.eof_received:
            self._table.remove(channel)

    def reset(self, channel: Channel, reason: str) -> None:
        """Send RST."""
        if self.channels.get(channel.sid) is channel:
            self.mux.reset(channel.sid, text=reason)
            self.schedule_flush()
            self._table.remove(channel)

    # Called by the pump, by the transport, and by the heartbeat, see `HeartbeatTarget`

    def on_event(self, events: int) -> None:
        """Handle events of the socket."""
        if events & UNTIL_EAGAIN:
            self._until_eagain = True
        if events & WRITABLE and self.send_buffer.blocked:
            self.send_buffer.unblock()
        if (events & READABLE or self._connection.has_buffered_input or self.mux.has_unparsed) and not self.over:
            self._read()

    def on_input(self, data: memoryview) -> int:
        """See `CarrierInput.on_input`."""
        if self.over:
            return len(data)
        if self._must_wait():
            return 0
        self.heartbeat.received = True
        self._parse(data, self.turns.share.left)
        if not self.over:
            self._must_wait()
        return len(data)

    def on_writable(self) -> None:
        """See `CarrierInput.on_writable`."""
        self.send_buffer.unblock()

    def on_lost(self, reason: str) -> None:
        """See `CarrierInput.on_lost`."""
        self._close(reason)

    def on_failure(self, error: Exception) -> None:
        """A callback raised, which is a bug: it closes this carrier and nothing else."""
        log.error("carrier failed: a bug", exc_info=error)
        self._close("internal error")

    def on_stop(self) -> None:
        """The pump stops."""
        self._close("the relay stopped")

    def send_ping(self) -> bool:
        """Returns whether a ping is outstanding now."""
        if self._ping.send():
            self.schedule_flush()
            self.pump.timers.wake_soon()
        return self._ping.outstanding

    def on_unresponsive(self) -> None:
        """The peer does not answer the ping."""
        self.owner.on_unresponsive()

    def on_dead(self, reason: str) -> None:
        """The peer is given up."""
        self._close(reason)

    # Internal

    def _must_wait(self) -> bool:
        """Whether input has to wait for a later turn, which comes."""
        if self.mux.has_unparsed or self.turns.share.left <= 0:
            self.turns.read_later()
            return True
        return False

    def _read(self) -> None:
        """Read until the socket is drained, or this turn's quantum or the owner's share of it is used up."""
        if self.turns.share.left <= 0:
            self.turns.read_later()
            return
        connection, mux, quantum, view = self._connection, self.mux, self.pump.quantum, self._view
        if mux.has_unparsed:
            self._parse(NO_DATA, self.turns.share.left)
        while not self.over:
            if mux.has_unparsed or self.turns.share.left <= 0:
                self.turns.read_later()
                return
            try:
                count = connection.receive_into(view)
            except BlockingIOError:
                return
            except OSError as error:
                self._close(f"connection lost: {reason_of(error)}")
                return
            if not count:
                self._close("the peer closed the connection")
                return
            self.heartbeat.received = True
            if self._authenticated:
                self._parse(view[:count], self.turns.share.left)
            else:
                self._parse_unauthenticated(view[:count])
            if connection.drained and not self._until_eagain and not mux.has_unparsed:
                return
            quantum -= count
            if quantum <= 0:
                connection.rearm()
                return

    @property
    def has_received(self) -> bool:
        """Whether the peer sent anything before it was authenticated."""
        return self._preauth_bytes > 0

    def _parse_unauthenticated(self, data: memoryview) -> None:
        """Parse at most `PREAUTH_LIMIT` bytes before the carrier is authenticated; close it beyond that."""
        left = PREAUTH_LIMIT - self._preauth_bytes
        self._preauth_bytes += len(data)
        self._parse(data[:left], MAX_FRAMES_PER_TURN)
        while self.mux.has_unparsed and not self.over:
            self._parse(NO_DATA, MAX_FRAMES_PER_TURN)
        if len(data) <= left or self.over:
            return
        if self._authenticated:
            self._parse(data[left:], MAX_FRAMES_PER_TURN)
        else:
            self._close(PREAUTH_EXCEEDED)

    def _parse(self, data: memoryview, max_frames: int) -> None:
        """Have the codec parse `data`, or this many frames of it, and act on each item."""
        channels = self.channels
        try:
            for item in self.mux.receive(data, max_frames):
                if isinstance(item, tuple):
                    channel = channels.get(item[0])
                    if channel is not None:
                        channel.feed(item[1])
                elif isinstance(item, Finished):
                    self._table.on_eof(item.session)
                else:
                    self._on_codec_event(item)
                if self.over:
                    return
        except RemoteProtocolError as error:
            self._close(f"the peer broke the WebMUX protocol: {error}")
            return
        share = self.turns.share
        share.left -= self.mux.cost
        if not share.is_active:
            share.activate()
        if self.mux.outgoing or self._connection.wants_write:
            self.schedule_flush()

    def _on_codec_event(self, event: Event) -> None:
        """Act on any event but data and FIN; those that every visitor causes come first."""
        match event:
            case CreditAdded(sid):
                self._table.on_credit(sid)
            case Accepted(sid) if sid != self._ping.sid:
                self.owner.on_capacity()
            case Opened(sid, protocol):
                if protocol == PING_PROTOCOL:
                    self.mux.reset(sid)
                else:
                    self.owner.on_opened(self._add(sid), protocol)
            case Accepted(sid) | SessionRefused(sid) | Broken(sid) if sid == self._ping.sid:
                self._on_ping_answered(event)
            case SessionRefused(sid, _, reason) | Reset(sid, _, reason) | Broken(sid, reason):
                self._table.on_reset(sid, reason)
            case EndpointDefined(_, uri):
                self.owner.on_endpoint(uri)
            case MssSet(mss):
                self.max_fragment = mss or NO_MSS

    def _on_ping_answered(self, event: Event) -> None:
        """SYN and RST answer a ping. `Broken` proves nothing, and a channel may have its session id next."""
        if self._ping.finish(accepted=isinstance(event, Accepted)):
            self.send_ping()
        elif not isinstance(event, Broken):
            self.owner.on_pong()

    def _add(self, sid: int) -> Channel:
        window = ReceiveWindow(self.limits.initial_window, self.limits.max_window, self._budget)
        channel = WebMuxChannel(self, sid, window)
        self._table.add(channel)
        return channel

    def _on_removed(self, channel: Channel) -> None:
        self.owner.on_over(channel)

    def _close(self, reason: str) -> None:
        if self.over:
            return
        self.over = True
        self.heartbeat.stop()
        self.send_buffer.close()
        self._connection.close()
        self.turns.close()
        self._table.close(reason)
        try:
            self.owner.on_closed(reason)
        except Exception as error:
            log.exception("could not report the end of a carrier: a bug", exc_info=error)
