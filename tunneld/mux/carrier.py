"""A carrier: one connection, many channels, and no task for any of them.

    epoll ──► on_event ──► codec ──► channel.arrived ──► the visitor's socket, at once
    visitor's socket ──► joint ──► channel.put ──► codec ──► `outgoing` ──► one write after the batch

One place writes, see `outbox`; while much waits there, visitors are not read. The kernel is kept from taking much more
than it can send, since what it has queued nobody can overtake.

Reading never waits for writing: what the peer makes us answer is bounded by the codec, everything else by credit, which
is granted only for octets that a channel's user has taken.
"""

from __future__ import annotations

from typing import Any

import structlog

from tunneld.engine.pump import Pump
from tunneld.engine.socket_flow import READABLE, UNTIL_EAGAIN, WRITABLE
from tunneld.errors import LimitReachedError, RemoteProtocolError, reason_of
from tunneld.mux.channel import CarrierEvents, Channel
from tunneld.mux.connection import Connection
from tunneld.mux.heartbeat import PING, Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.send_buffer import SendBuffer
from tunneld.mux.window import ReceiveWindow, WindowBudget
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
"""Opened by one side at once: an id of the 127 is for the heartbeat."""
MAX_FRAMES_PER_TURN = 256
"""Fragments heard before others have their turn. Nobody is kept waiting for long by few octets, be they the dearest of
fragments; and the honest, whose fragments carry something, fill their turn by octets first or have a millisecond's work
done.
"""
PREAUTH_LIMIT = 4096
"""Octets until the owner knows whose the carrier is: what it is called after, with room for what an agent of another
make says first.
"""
PREAUTH_EXCEEDED = f"it said more than {PREAUTH_LIMIT} octets and not whose it is"
NOTHING = memoryview(b"")
GIVE_UP = 6
"""Heartbeats after which the kernel may give a connection up: the heartbeat does it after two or three."""
FRAGMENTS = 256
"""That one `Mux.send` makes at most; a peer's MSS of one octet must not stop the others."""

log = structlog.get_logger("session")


class Carrier:
    """One connection that carries channels; the pump's handler for it."""

    def __init__(
        self,
        pump: Pump,
        link: Connection,
        owner: CarrierEvents,
        *,
        initiator: bool,
        limits: CarrierLimits,
        is_strange: bool = False,
    ) -> None:
        """Begin to serve; `initiator` says who made the connection. Somebody strange may say `PREAUTH_LIMIT` octets
        until `welcome`. Raises OSError where it is closed already.
        """
        self.pump = pump
        self.limits = limits
        self.mux = Mux(initiator=initiator)
        self.over = False
        self.owner = owner
        self.channels: dict[int, Channel] = {}
        self._parity = 0 if initiator else 1  # of the ids that we open
        self._link = link
        self._fd = link.connection.fileno()
        self._budget = WindowBudget(limits.memory, pump.now, link.round_trip)
        self._ours = 0  # channels that we opened
        self._burst = 1 << 30  # octets that one `put` may cost, by the peer's MSS
        self._outbox = SendBuffer(pump, link, self.mux.outgoing, limits, self._end)
        self.touch = self._outbox.schedule_flush
        self._exact = False
        self._is_strange = is_strange
        self._said = 0  # octets, while it was strange
        self._ping: int | None = None  # the session that asks for a sign of life
        self._ask_again = False  # what was said since then is to be confirmed as well
        link.keep_unsent_below(limits.unsent)
        link.resend_within(limits.resend, GIVE_UP * limits.heartbeat)
        self.mux.set_default_credit(limits.first_window)
        pump.attach(self._fd, self)
        self.heartbeat = Heartbeat(self, limits, pump.timers, link.idle_seconds)
        self.touch()

    # What its owner does

    @property
    def can_open(self) -> bool:
        """Whether `open` would succeed."""
        return not self.over and self._ours < MAX_CHANNELS and self.mux.can_open

    @property
    def answering(self) -> bool:
        """Whether the peer has not fallen silent, as far as we know."""
        return self.heartbeat.received or not self.heartbeat.unresponsive

    @property
    def channels_left(self) -> int:
        """How many channels could be opened, at least about."""
        return 0 if self.over else MAX_CHANNELS - self._ours

    def open(self, protocol: int) -> Channel:
        """Open a channel. Raises `LimitReachedError` unless `can_open`."""
        if not self.can_open:
            raise LimitReachedError("could not open a channel: all ids of the carrier are in use")
        channel = self._add(self.mux.open(protocol))
        self._ours += 1
        self.touch()
        if self.over:
            raise LimitReachedError("could not open a channel: the carrier was lost")
        self.heartbeat.expect_reply()
        return channel

    def mark_authenticated(self) -> None:
        """It is known whose it is."""
        self._is_strange = False

    def define_endpoint(self, uri: str) -> None:
        """Say that we can be called back as `uri` (InternAtom, DefineEndpoint)."""
        self.mux.define_endpoint(self.mux.intern_atom(0, uri))
        self.touch()

    def request_ack(self) -> None:
        """Have the owner told (`answered`) once the peer has read all that was said until now."""
        self._ask_again = self._ping is not None
        self.send_ping()

    def close(self, reason: str = "closed") -> None:
        """End the carrier and every channel on it. Harmless when repeated."""
        self._end(reason)
        self.pump.timers.wake_soon()

    # What its channels do, see `Carries`

    def accept(self, channel: Channel) -> None:
        """SYN."""
        self.mux.accept(channel.sid)
        self.touch()

    def set_originator(self, channel: Channel, visitor: Any | None) -> None:
        """WebMUX has no word for it."""

    def send_capacity(self, channel: Channel) -> int:
        """See `Carries`: by the carrier's own room, what AddCredit has granted, and the peer's MSS."""
        return min(self._outbox.send_capacity(channel), self.mux.credit(channel.sid), self._burst)

    def write(self, sid: int, data: memoryview) -> int:
        """Put octets on the carrier; returns how many were taken: all, if there was `room`."""
        taken = self.mux.send(sid, data)
        self.touch()
        return taken

    def grant_credit(self, sid: int, octets: int) -> None:
        """Let the peer send so many octets more."""
        self.mux.grant(sid, octets)
        self.touch()

    def finish(self, channel: Channel) -> None:
        """FIN."""
        self.mux.finish(channel.sid)
        self.touch()
        if channel.eof_received:
            self._remove(channel)

    def reset(self, channel: Channel, reason: str) -> None:
        """RST."""
        if self.channels.get(channel.sid) is channel:
            self.mux.reset(channel.sid, text=reason)
            self.touch()
            self._remove(channel)

    # The pump's handler

    def on_event(self, events: int) -> None:
        """Something happened on the connection."""
        if events & UNTIL_EAGAIN:
            self._exact = True
        if events & WRITABLE:
            self._outbox.unblock()
        if (events & READABLE or self._link.has_buffered_input or self.mux.has_unparsed) and not self.over:
            self._read()

    def on_failure(self, error: Exception) -> None:
        """A bug of ours: it costs the carrier, nothing else."""
        log.error("carrier failed", exc_info=error)
        self._end("internal error")

    def on_stop(self) -> None:
        """The pump stops."""
        self._end("the relay stopped")

    # Its heartbeat

    def send_ping(self) -> bool:
        """See `Heart`."""
        if self._ping is None and self.mux.can_open:
            self._ping = self.mux.open(PING)
            self.touch()
            self.pump.timers.wake_soon()
        return self._ping is not None

    def on_unresponsive(self) -> None:
        """See `Heart`."""
        self.owner.on_unresponsive()

    def on_dead(self, reason: str) -> None:
        """See `Heart`."""
        self._end(reason)

    # Inside

    def _read(self) -> None:
        """Read until the connection is drained, or this turn's share is used up."""
        buffer, link = self.pump.wide_buffer, self._link
        share = self.pump.quantum
        with memoryview(buffer) as view:
            if self.mux.has_unparsed:
                self._hear(NOTHING)
            while not self.over:
                if self.mux.has_unparsed:
                    self.pump.rearm(self._fd)
                    return
                try:
                    count = link.receive_into(view)
                except BlockingIOError:
                    return
                except OSError as error:
                    self._end(f"its connection broke: {reason_of(error)}")
                    return
                if not count:
                    self._end("the peer closed it")
                    return
                self.heartbeat.received = True
                if self._is_strange:
                    self._hear_out(view[:count])
                else:
                    self._hear(view[:count])
                if link.drained and not self._exact and not self.mux.has_unparsed:
                    return
                share -= count
                if share <= 0:
                    self.pump.rearm(self._fd)
                    return

    def _hear_out(self, data: memoryview) -> None:
        """Somebody strange: whoever says a lot does not say whose it is."""
        room = PREAUTH_LIMIT - self._said
        self._said += len(data)
        self._hear(data[:room])
        while self.mux.has_unparsed and not self.over:
            self._hear(NOTHING)
        if len(data) <= room or self.over:
            return
        if self._is_strange:
            self._end(PREAUTH_EXCEEDED)
        else:
            self._hear(data[room:])

    def _hear(self, data: memoryview) -> None:
        """Let the codec read what arrived, and do what it says."""
        channels = self.channels
        try:
            for item in self.mux.receive(data, MAX_FRAMES_PER_TURN):
                if isinstance(item, tuple):
                    channel = channels.get(item[0])
                    if channel is not None:
                        channel.feed(item[1])
                elif isinstance(item, Finished):
                    self._hear_finished(item.session)
                else:
                    self._obey(item)
                if self.over:
                    return
        except RemoteProtocolError as error:
            self._end(f"the peer broke the protocol: {error}")
            return
        if self.mux.outgoing or self._link.pending_output:
            self.touch()

    def _obey(self, event: Event) -> None:
        """Everything that is neither data nor its end."""
        match event:
            case Opened(session, protocol):
                self._hear_opened(session, protocol)
            case Accepted(session) | SessionRefused(session) if session == self._ping:
                self._hear_pong(event)
            case Broken(session) if session == self._ping:
                self._lose_ping()
            case Accepted():
                self.owner.on_capacity()
            case EndpointDefined(_, uri):
                self.owner.on_endpoint(uri)
            case MssSet(octets):
                self._burst = octets * FRAGMENTS or 1 << 30
            case CreditAdded(session):
                if channel := self.channels.get(session):
                    channel.notify_writable()
            case SessionRefused(session, _, reason) | Reset(session, _, reason) | Broken(session, reason):
                if channel := self.channels.get(session):
                    self._remove(channel)
                    channel.notify_reset(reason or "closed by the peer")

    def _hear_finished(self, session: int) -> None:
        if channel := self.channels.get(session):
            if channel.eof_sent:
                self._remove(channel)  # first: the codec has forgotten it, whatever its user does of this
            channel.feed_eof()

    def _hear_opened(self, session: int, protocol: int) -> None:
        if protocol == PING:
            self.mux.reset(session)
        else:
            self.owner.on_opened(self._add(session), protocol)

    def _hear_pong(self, event: Accepted | SessionRefused) -> None:
        """Any answer is one; a peer that accepts has its session reset."""
        self._ping = None
        if isinstance(event, Accepted):
            self.mux.reset(event.session)
        if self._ask_again:
            self._ask_anew()
        else:
            self.owner.on_pong()

    def _lose_ping(self) -> None:
        """It said on that session what cannot be said there, and so nothing of its life: the session is another's
        from here on.
        """
        self._ping = None
        if self._ask_again:
            self._ask_anew()

    def _ask_anew(self) -> None:
        self._ask_again = False
        self.send_ping()

    def _add(self, sid: int) -> Channel:
        limits = self.limits
        window = ReceiveWindow(limits.first_window, limits.max_window, self._budget)
        self.channels[sid] = channel = Channel(self, sid, window)
        return channel

    def _remove(self, channel: Channel) -> None:
        """Both directions are over for the codec; what is held can still be taken."""
        if self.channels.pop(channel.sid, None) is not channel:
            return
        channel.release_window()
        if channel.sid & 1 == self._parity:
            self._ours -= 1
        self.owner.on_capacity()

    def _end(self, reason: str) -> None:
        if self.over:
            return
        self.over = True
        self.heartbeat.stop()
        self.pump.remove(self._fd, self)
        self._outbox.close()
        self._link.close()
        channels, self.channels = self.channels, {}
        for channel in channels.values():
            channel.notify_reset(f"the carrier was lost: {reason}")
        try:
            self.owner.on_closed(reason)
        except Exception as error:
            log.exception("could not tell the end of a carrier", exc_info=error)
