"""An association of two EGTP nodes: a carrier whose channels are streams in messages, over one link after another.

    link ──► number ──► inbox ──► streams ──► Channel.feed ──► the visitor's socket
    visitor's socket ──► Channel.write ──► streams ──► `outgoing` ──► one message after the batch ──► link

While it has no link, the carrier opens no channel and writes nothing, and its channels wait. If no link comes within
`resume_timeout`, they are reset.

    attached ──link lost──► detached ──another link──► attached: what was not acknowledged is sent again
        │                      └──resume_timeout──► over
        └──goodbye, or a broken stream──► over

A peer that cannot hold a connection polls instead: its links only bring what it sends, and take along what waits.

As in a WebMUX carrier, reading never waits for writing; see `mux.carrier`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from tunneld.egtp.channel import StreamChannel
from tunneld.egtp.link import MAX_STREAM_MESSAGE, Link
from tunneld.egtp.output import MessageOutput
from tunneld.engine.pump import Pump
from tunneld.engine.timers import Timers
from tunneld.errors import LimitReachedError, RemoteProtocolError
from tunneld.log import Logger
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import MAX_FRAMES_PER_TURN, CarrierLimits
from tunneld.mux.send_buffer import SendBuffer
from tunneld.mux.turns import CarrierTurns
from tunneld.mux.window import ReceiveWindow, WindowBudget
from tunneld.net.endpoint import Peer
from tunneld.wire.egtp.attaching import AttachRequest
from tunneld.wire.egtp.delivery import Inbox
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, canonical_kind
from tunneld.wire.egtp.streams import (
    INITIAL_CREDIT,
    PeerLeft,
    PeerRetired,
    Stream,
    StreamCredit,
    StreamEnded,
    StreamItem,
    StreamOpened,
    StreamReset,
    Streams,
)
from tunneld.wire.mencode import Value

FLUSH_SIZE = 256 * 1024
"""Octets of frames that become a message at once, rather than after the batch. A message costs 70 µs at both ends
together, as much as encrypting 100 KiB; and no more than `CarrierLimits.pause_at` pends anyway.
"""

log = Logger("egtp")


@dataclass(frozen=True, slots=True)
class AssociationLimits:
    """Times in seconds, and a count."""

    resume_timeout: float = 15.0
    "How long channels wait for another link: enough for a network that changes, and not too long for a visitor."

    retransmission: float = 30.0
    """After this time without a response, a message is sent again. TCP loses nothing, and a link that is given up by
    the heartbeat makes the other end send everything again at once: so this is for a peer that had no room.
    """

    max_channels: int = 1000
    "Channels at once: as many visitors."


class AssociationEvents(Protocol):
    """The callbacks of a carrier's owner, called in the pump's task."""

    def on_opened(self, channel: Channel, label: bytes) -> None:
        """The peer opened a channel: set its handler or `reset` it before this returns."""

    def on_capacity(self) -> None:
        """A channel ended, or there is a link again, so `open` may succeed."""

    def on_retired(self) -> None:
        """The peer wants no more channels."""

    def on_settled(self) -> None:
        """The peer has acknowledged everything that was sent."""

    def on_unresponsive(self) -> None:
        """The peer does not answer; the link may be about to be lost."""

    def on_detached(self, reason: str) -> None:
        """The link is lost; the channels wait for another one."""

    def on_closed(self, reason: str) -> None:
        """The association is over, and so are its channels."""


class EgtpCarrier:
    """One association. Implements `LinkOwner`, `ChannelTransport` and `HeartbeatTarget`."""

    def __init__(
        self,
        pump: Pump,
        owner: AssociationEvents,
        *,
        initiator: bool,
        limits: CarrierLimits,
        times: AssociationLimits,
    ) -> None:
        """`initiator` is whether this node made the association."""
        self.pump = pump
        self.limits = limits
        self.owner = owner
        self.streams = Streams(initiator=initiator)
        self.output = MessageOutput(pump.now)
        self.channels: dict[int, StreamChannel] = {}
        self.over = False
        self.inbox = Inbox()
        self.turns = CarrierTurns(pump.budget, self._continue, self.on_failure)
        self.send_buffer = SendBuffer(pump, self.output, self.streams.outgoing, limits, self._close, FLUSH_SIZE)
        self._times = times
        self._opened = 0
        self._parity = 1 if initiator else 0
        self._budget = WindowBudget(limits.window_budget, pump.now, self._round_trip)
        self.polled = False  # the peer has asked for what waits, and does so again before `resume_timeout`
        self._polling: Link | None = None  # a link of a peer that polls
        self._resume = _Alarm(pump.timers, self._on_not_resumed)
        self._retransmission = _Alarm(pump.timers, self._on_overdue)
        self.heartbeat = Heartbeat(self, limits, pump.timers, self._idle_seconds)
        self.heartbeat.stop()

    # Called by the owner

    @property
    def attached(self) -> bool:
        """Whether it has a link."""
        return self.output.link is not None

    @property
    def answering(self) -> bool:
        """Whether the peer is responsive, as far as is known."""
        return self.polled or (self.attached and (self.heartbeat.received or not self.heartbeat.unresponsive))

    @property
    def channels_left(self) -> int:
        """How many more channels can be opened now."""
        reachable = (self.attached or self.polled) and not self.over
        return self._times.max_channels - self._opened if reachable else 0

    @property
    def settled(self) -> bool:
        """Whether the peer has acknowledged everything that was sent."""
        return not self.streams.outgoing and self.output.outbox.is_empty

    def open(self, port: int) -> Channel:
        """Open a channel for a visitor of this port; the caller sets its handler or joins it. Raises
        `LimitReachedError` if that is not possible now.
        """
        if self.channels_left <= 0:
            raise LimitReachedError("could not open a channel: the node is not connected or has no more room")
        channel = self._add(self.streams.open(b"%d" % port))
        self._opened += 1
        self.schedule_flush()
        if self.over:
            raise LimitReachedError("could not open a channel: the association was lost")
        if self.attached:
            self.heartbeat.expect_reply()
        return channel

    def attach(self, link: Link, received: int) -> None:
        """Go on with this link, in place of the present one. The peer has all messages before `received`.

        Raises OSError if its connection is closed already.
        """
        self._drop_links()
        self.output.link = link
        self.polled = False
        self._resume.cancel()
        self.heartbeat.stop()
        self.heartbeat = Heartbeat(self, self.limits, self.pump.timers, self._idle_seconds)
        self.output.outbox.acknowledge_before(received)
        link.start(self)
        self.output.send_overdue(0)
        self._retransmission.set(self._times.retransmission)
        self.send_buffer.unblock()
        self.schedule_flush()
        self.owner.on_capacity()

    def collect(self, received: int) -> list[bytes]:
        """The peer polls: return the messages that wait for it, with their numbers. It has all before `received`."""
        self.polled = True
        self._resume.set(self._times.resume_timeout)
        self.output.outbox.acknowledge_before(received)
        waiting = self.output.collect(self.streams.outgoing, MAX_STREAM_MESSAGE)
        self.send_buffer.unblock()
        return waiting

    def attach_polling(self, link: Link) -> None:
        """Take what the peer sends on this link, on which it has polled. Raises OSError as `attach`."""
        self._drop_links()
        self.heartbeat.stop()
        self._polling = link
        link.start(self)
        self.owner.on_capacity()

    def retire(self) -> None:
        """Ask the peer for no more channels; `on_settled` is called once it knows."""
        self.streams.retire()
        self.schedule_flush()
        self.pump.timers.wake_soon()

    def ask(self) -> None:
        """Send the peer a message that it must acknowledge."""
        self.send_ping()

    def close(self, reason: str = "closed") -> None:
        """End the association and every channel, and tell the peer if there is a link. Harmless when repeated."""
        if not self.over:
            self.streams.leave(reason)
            self.send_buffer.flush()
        self._close(reason)
        self.pump.timers.wake_soon()

    # Called by channels, see `ChannelTransport`

    def schedule_flush(self) -> None:
        """Send pending frames after the batch."""
        if len(self.streams.outgoing) > MAX_STREAM_MESSAGE:
            self._close("the peer sends but does not read")
            return
        self.send_buffer.schedule_flush()

    def accept(self, channel: Channel) -> None:
        """Nothing: a channel that is not wanted is reset."""

    def set_originator(self, channel: Channel, visitor: Peer | None) -> None:
        """Nothing: a stream has no frame for it."""

    def write(self, sid: int, data: memoryview) -> int:
        """See `ChannelTransport.write`."""
        stream = self.streams.streams.get(sid)
        sent = 0 if stream is None else self.streams.send(stream, data)
        self.schedule_flush()
        return sent

    def grant_credit(self, sid: int, size: int) -> None:
        """Send CREDIT."""
        self.streams.grant(sid, size)
        self.schedule_flush()

    def finish(self, channel: Channel) -> None:
        """Send EOF."""
        self.streams.finish(channel.sid)
        self.schedule_flush()
        if channel.eof_received:
            self._remove(channel)

    def reset(self, channel: Channel, reason: str) -> None:
        """Send RESET."""
        if self.channels.get(channel.sid) is channel:
            self.streams.reset(channel.sid, reason)
            self.schedule_flush()
            self._remove(channel)

    # Called by the link, see `LinkOwner`

    @property
    def must_wait(self) -> bool:
        """Whether the owner's share of this turn is used up, or frames are left to be parsed."""
        if self.streams.has_unparsed or self.turns.share.left <= 0:
            self.turns.read_later()
            return True
        return False

    def on_streams(self, number: int, frames: memoryview) -> bool:
        """See `LinkOwner.on_streams`."""
        ready = self.inbox.receive(number, frames)
        for each in ready or ():
            self.streams.receive(each)
        self._parse()
        return ready is not None

    def on_acknowledged(self, number: int) -> None:
        """See `LinkOwner.on_acknowledged`."""
        output = self.output
        output.outbox.acknowledge_before(number + 1)
        if self.send_buffer.blocked and output.is_ready:
            self.send_buffer.unblock()
        if self.settled:
            self.owner.on_settled()

    def on_request(self, request: MojoRequest) -> Value:
        """See `LinkOwner.on_request`: the peer polls again."""
        if canonical_kind(request.kind) != ARE_THERE_MESSAGES or not self.polled:
            raise RemoteProtocolError("unrecognized message type")
        return list(self.collect(AttachRequest.parse(request.body).received))

    def on_writable(self) -> None:
        """See `LinkOwner.on_writable`."""
        self.send_buffer.unblock()

    def on_input(self) -> None:
        """See `LinkOwner.on_input`."""
        self.heartbeat.received = True

    def on_lost(self, link: Link, reason: str) -> None:
        """See `LinkOwner.on_lost`."""
        if link is self._polling:
            self._polling = None
        if link is not self.output.link:
            return
        self.output.link = None
        self.heartbeat.stop()
        if not self.over:
            self._resume.set(self._times.resume_timeout)
            self.owner.on_detached(reason)

    def on_stop(self) -> None:
        """See `LinkOwner.on_stop`."""
        self._close("the relay stopped")

    # Called by the heartbeat, see `HeartbeatTarget`

    def send_ping(self) -> bool:
        """See `HeartbeatTarget.send_ping`: a message without frames, which the peer acknowledges."""
        output, link = self.output, self.output.link
        if link is None or not output.outbox.has_room:
            return False
        output.send(link, b"")
        link.flush()
        return True

    def on_unresponsive(self) -> None:
        """See `HeartbeatTarget.on_unresponsive`."""
        self.owner.on_unresponsive()

    def on_dead(self, reason: str) -> None:
        """See `HeartbeatTarget.on_dead`."""
        link = self.output.link
        if link is not None:
            link.close()
            self.on_lost(link, reason)

    def on_failure(self, error: Exception) -> None:
        """A callback raised, which is a bug: it ends this carrier and nothing else."""
        log.error("association failed: a bug", exc_info=error)
        self._close("internal error")

    # Internal

    def _continue(self) -> None:
        """A later turn: parse what is left, then read on."""
        self._parse()
        link = self.output.link or self._polling
        if link is not None and not self.over:
            link.read()

    def _parse(self) -> None:
        """Parse frames as far as this turn goes, and act on each."""
        if not self.streams.has_unparsed:
            return
        channels, count = self.channels, 0
        try:
            for item in self.streams.parse(min(MAX_FRAMES_PER_TURN, max(self.turns.share.left, 1))):
                count += 1
                if isinstance(item, tuple):
                    channel = channels.get(item[0])
                    if channel is not None:
                        channel.feed(item[1])
                else:
                    self._on_frame(item)
                if self.over:
                    return
        except RemoteProtocolError as error:
            self.close(f"the peer broke the protocol of streams: {error}")
            return
        self.turns.share.use(count)
        if self.streams.outgoing:
            self.schedule_flush()

    def _on_frame(self, item: StreamItem) -> None:
        """Act on any frame but data."""
        match item:
            case StreamOpened(sid, label):
                self._on_opened(sid, label)
            case StreamCredit(sid):
                channel = self.channels.get(sid)
                if channel is not None and not self.turns.waits(channel):
                    channel.notify_writable()
            case StreamEnded(sid):
                channel = self.channels.get(sid)
                if channel is not None:
                    if channel.eof_sent:
                        self._remove(channel)
                    channel.feed_eof()
            case StreamReset(sid, reason):
                channel = self.channels.get(sid)
                if channel is not None:
                    self._remove(channel)
                    channel.notify_reset(reason or "closed by the peer")
            case PeerRetired():
                self.owner.on_retired()
            case PeerLeft(reason):
                self._close(f"the peer left: {reason}")

    def _on_opened(self, sid: int, label: bytes) -> None:
        if len(self.channels) >= self._times.max_channels:
            self.streams.reset(sid, "too many streams")
            return
        self.owner.on_opened(self._add(self.streams.streams[sid]), label)

    def _add(self, stream: Stream) -> StreamChannel:
        window = ReceiveWindow(INITIAL_CREDIT, self.limits.max_window, self._budget)
        channel = self.channels[stream.sid] = StreamChannel(self, stream, window)
        return channel

    def _remove(self, channel: Channel) -> None:
        """Both directions are over for the peer; the channel's buffered bytes can still be consumed."""
        if self.channels.pop(channel.sid, None) is None:
            return
        self.turns.forget(channel)
        channel.release_window()
        if channel.sid & 1 == self._parity:
            self._opened -= 1
        self.owner.on_capacity()

    def _drop_links(self) -> None:
        links = self.output.link, self._polling
        self.output.link = self._polling = None
        for link in links:
            if link is not None:
                link.close()

    def _on_not_resumed(self) -> None:
        self._close(f"not connected again within {self._times.resume_timeout:g} s")

    def _on_overdue(self) -> None:
        self.output.send_overdue(self._times.retransmission)
        if self.attached:
            self._retransmission.set(self._times.retransmission)

    def _round_trip(self) -> float:
        link = self.output.link
        return math.inf if link is None else link.round_trip()

    def _idle_seconds(self) -> float:
        link = self.output.link
        return 0.0 if link is None else link.idle_seconds()

    def _close(self, reason: str) -> None:
        if self.over:
            return
        self.over = True
        self.heartbeat.stop()
        self._resume.cancel()
        self._retransmission.cancel()
        self.send_buffer.close()
        self._drop_links()
        self.turns.close()
        channels, self.channels = self.channels, {}
        for channel in channels.values():
            channel.notify_reset(f"multiplexed connection lost: {reason}")
        try:
            self.owner.on_closed(reason)
        except Exception as error:
            log.exception("could not report the end of a carrier: a bug", exc_info=error)


class _Alarm:
    """Calls a function at a time, once."""

    __slots__ = ("_callback", "_timers", "deadline")

    def __init__(self, timers: Timers, callback: Callable[[], None]) -> None:
        self.deadline = 0.0
        self._timers = timers
        self._callback = callback

    def set(self, seconds: float) -> None:
        """Call the function in that many seconds; a call that was to come before does not."""
        self.deadline = trio.current_time() + seconds
        self._timers.watch(self)

    def cancel(self) -> None:
        """Do not call it. Harmless when repeated."""
        self._timers.forget(self)

    def on_deadline(self) -> None:
        self._callback()
