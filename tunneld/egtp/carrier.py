"""An association of two EGTP nodes: a carrier whose channels are streams in messages.

    attachment ──► streams ──► Channel.feed ──► the visitor's socket
    visitor's socket ──► Channel.write ──► streams ──► `outgoing` ──► one message after the batch ──► attachment

While the peer cannot be reached, the carrier opens no channel and writes nothing, and its channels wait; see
`attachment`. As in a WebMUX carrier, reading never waits for writing; see `mux.carrier`.
"""

from __future__ import annotations

from tunneld.egtp.attachment import Attachment
from tunneld.egtp.channel import StreamChannel
from tunneld.egtp.limits import FLUSH_SIZE, MAX_STREAM_MESSAGE, AssociationLimits
from tunneld.egtp.output import OutputBudget
from tunneld.egtp.owners import AssociationEvents
from tunneld.engine.pump import Pump
from tunneld.errors import LimitReachedError, RemoteProtocolError
from tunneld.log import Logger
from tunneld.mux.channel import Channel
from tunneld.mux.channel_table import ChannelTable
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import MAX_FRAMES_PER_TURN, CarrierLimits
from tunneld.mux.send_buffer import SendBuffer
from tunneld.mux.turns import CarrierTurns
from tunneld.mux.window import ReceiveWindow, WindowBudget
from tunneld.net.endpoint import Peer
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

log = Logger("egtp")


class EgtpCarrier:
    """One association. Implements `ChannelTransport` and `FrameOwner`."""

    def __init__(
        self,
        pump: Pump,
        owner: AssociationEvents,
        *,
        initiator: bool,
        limits: CarrierLimits,
        times: AssociationLimits,
        budget: OutputBudget | None = None,
    ) -> None:
        """`initiator` is whether this node made the association. `budget` is shared by those of one owner; None: no
        limit.
        """
        self.pump = pump
        self.limits = limits
        self.owner = owner
        self.streams = Streams(initiator=initiator)
        self.over = False
        self.attachment = Attachment(pump, self, owner, limits, times, budget or OutputBudget())
        self.turns = CarrierTurns(pump.budget, self._continue, self.on_failure)
        self.send_buffer = SendBuffer(pump, self.attachment.output, self.outgoing, limits, self.end, FLUSH_SIZE)
        self._max_channels = times.max_channels
        self._budget = WindowBudget(limits.window_budget, pump.now, self.attachment.round_trip)
        self._table = ChannelTable(self.turns, 1 if initiator else 0, self._on_removed)
        self.channels = self._table.channels

    # Called by the owner

    @property
    def heartbeat(self) -> Heartbeat:
        """Tells whether the peer is alive, while there is a link."""
        return self.attachment.heartbeat

    @property
    def answering(self) -> bool:
        """Whether the peer is responsive, as far as is known."""
        return self.attachment.answering

    @property
    def channels_left(self) -> int:
        """How many more channels can be opened now."""
        if self.over or not self.attachment.reachable:
            return 0
        if not self.attachment.attached and len(self.outgoing) >= self.limits.pause_at:
            return 0  # they wait for the next poll
        return self._max_channels - self._table.opened

    def open(self, port: int) -> Channel:
        """Open a channel for a visitor of this port; the caller sets its handler or joins it. Raises
        `LimitReachedError` if that is not possible now.
        """
        if self.channels_left <= 0:
            raise LimitReachedError("could not open a channel: the node is not connected or has no more room")
        channel = self._add(self.streams.open(b"%d" % port))
        self.schedule_flush()
        if self.over:
            raise LimitReachedError("could not open a channel: the association was lost")
        if self.attachment.attached:
            self.heartbeat.expect_reply()
        return channel

    def retire(self) -> None:
        """Ask the peer for no more channels; `on_settled` is called once it knows."""
        self.streams.retire()
        self.schedule_flush()
        self.pump.timers.wake_soon()

    def close(self, reason: str = "closed") -> None:
        """End the association and every channel, and tell the peer if there is a link. Harmless when repeated."""
        if not self.over:
            self.streams.leave(reason)
            self.send_buffer.flush()
        self.end(reason)
        self.pump.timers.wake_soon()

    # Called by channels, see `ChannelTransport`

    def schedule_flush(self) -> None:
        """Send pending frames after the batch."""
        if len(self.outgoing) > MAX_STREAM_MESSAGE:
            self.end("the peer sends but does not read")
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
            self._table.remove(channel)

    def reset(self, channel: Channel, reason: str) -> None:
        """Send RESET."""
        if self.channels.get(channel.sid) is channel:
            self.streams.reset(channel.sid, reason)
            self.schedule_flush()
            self._table.remove(channel)

    # Called by the attachment, see `FrameOwner`

    @property
    def outgoing(self) -> bytearray:
        """See `FrameOwner.outgoing`."""
        return self.streams.outgoing

    @property
    def must_wait(self) -> bool:
        """Whether the owner's share of this turn is used up, or frames are left to be parsed."""
        if self.streams.has_unparsed or self.turns.share.left <= 0:
            self.turns.read_later()
            return True
        return False

    def use(self, cost: int) -> None:
        """See `FrameOwner.use`."""
        self.turns.share.use(cost)

    def receive(self, messages: list[bytes | memoryview]) -> None:
        """See `FrameOwner.receive`."""
        for frames in messages:
            self.streams.receive(frames)
        self._parse()

    def on_reachable(self) -> None:
        """See `FrameOwner.on_reachable`."""
        if self.outgoing:
            self.schedule_flush()
        self.owner.on_capacity()

    def on_room(self) -> None:
        """See `FrameOwner.on_room`."""
        self.send_buffer.unblock()

    def end(self, reason: str) -> None:
        """See `FrameOwner.end`. Harmless when repeated."""
        if self.over:
            return
        self.over = True
        self.send_buffer.close()
        self.attachment.close()
        self.turns.close()
        self._table.close(reason)
        try:
            self.owner.on_closed(reason)
        except Exception as error:
            log.exception("could not report the end of a carrier: a bug", exc_info=error)

    def on_failure(self, error: Exception) -> None:
        """A callback raised, which is a bug: it ends this carrier and nothing else."""
        log.error("association failed: a bug", exc_info=error)
        self.end("internal error")

    # Internal

    def _continue(self) -> None:
        """A later turn: parse what is left, then read on."""
        self._parse()
        if self.streams.has_unparsed and not self.over:
            self.turns.read_later()
        elif not self.over:
            self.attachment.read_on()

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
        if self.outgoing:
            self.schedule_flush()
        if self.streams.has_unparsed:
            self.turns.read_later()

    def _on_frame(self, item: StreamItem) -> None:
        """Act on any frame but data."""
        match item:
            case StreamOpened(sid, label):
                self._on_opened(sid, label)
            case StreamCredit(sid):
                self._table.on_credit(sid)
            case StreamEnded(sid):
                self._table.on_eof(sid)
            case StreamReset(sid, reason):
                self._table.on_reset(sid, reason)
            case PeerRetired():
                self.owner.on_retired()
            case PeerLeft(reason):
                self.end(f"the peer left: {reason}")

    def _on_opened(self, sid: int, label: bytes) -> None:
        if len(self.channels) >= self._max_channels:
            self.streams.reset(sid, "too many streams")
            return
        self.owner.on_opened(self._add(self.streams.streams[sid]), label)

    def _add(self, stream: Stream) -> StreamChannel:
        window = ReceiveWindow(INITIAL_CREDIT, self.limits.max_window, self._budget)
        channel = StreamChannel(self, stream, window)
        self._table.add(channel)
        return channel

    def _on_removed(self, _channel: Channel) -> None:
        self.owner.on_capacity()
