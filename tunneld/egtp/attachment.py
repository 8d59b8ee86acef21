"""How an association reaches its peer: over one link after another, or by answers to polls.

    attached ──link lost──► detached ──another link──► attached: what was not acknowledged is sent again
        │                      └──resume_timeout──► over
        └──goodbye, or a broken stream──► over

A peer that cannot hold a connection polls instead: its links only bring what it sends, and take along what waits for it
when it asks. At the peer such a link is attached like any other, and `ask` fetches what waits.

Messages get their numbers here, and arrive in their order (`wire.egtp.delivery`).
"""

from __future__ import annotations

import math

from tunneld.egtp.limits import MAX_STREAM_MESSAGE, AssociationLimits
from tunneld.egtp.link import Link
from tunneld.egtp.output import MessageOutput, OutputBudget
from tunneld.egtp.owners import AssociationEvents, FrameOwner
from tunneld.engine.pump import Pump
from tunneld.engine.timers import Alarm
from tunneld.errors import RemoteProtocolError
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.wire.egtp.attaching import AttachRequest
from tunneld.wire.egtp.delivery import Inbox
from tunneld.wire.egtp.envelope import decode_streams
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, canonical_kind, parse_mail
from tunneld.wire.mencode import Value


class Attachment:
    """The links of one association, and its numbered messages. Implements `LinkOwner` and `HeartbeatTarget`."""

    def __init__(
        self,
        pump: Pump,
        frames: FrameOwner,
        events: AssociationEvents,
        limits: CarrierLimits,
        times: AssociationLimits,
        budget: OutputBudget,
    ) -> None:
        """`budget` is what all associations of one owner may keep together."""
        self.output = MessageOutput(pump.now, budget, events.on_output)
        self.inbox = Inbox()
        self.polled = False  # the peer has asked for what waits, and does so again before `patience` is over
        self.patience = times.resume_timeout  # seconds to wait for another link, or poll
        self._pump = pump
        self._frames = frames
        self._events = events
        self._limits = limits
        self._times = times
        self._polling: Link | None = None  # a link of a peer that polls
        self._resume = Alarm(pump.timers, self._on_not_resumed)
        self._retransmission = Alarm(pump.timers, self._on_overdue)
        self.heartbeat = Heartbeat(self, limits, pump.timers, self._idle_seconds)
        self.heartbeat.stop()

    # Called by the owner of the association

    @property
    def attached(self) -> bool:
        """Whether it has a link."""
        return self.output.link is not None

    @property
    def reachable(self) -> bool:
        """Whether what is sent arrives, as far as is known, now or with the next poll."""
        return self.attached or self.polled

    @property
    def answering(self) -> bool:
        """Whether the peer is responsive, as far as is known."""
        return self.polled or (self.attached and (self.heartbeat.received or not self.heartbeat.unresponsive))

    @property
    def settled(self) -> bool:
        """Whether the peer has acknowledged everything that was sent."""
        return not self._frames.outgoing and self.output.outbox.is_empty

    @property
    def progress(self) -> tuple[int, int]:
        """Numbers of the next message in each direction: how many there were."""
        return self.inbox.next, self.output.outbox.next

    def attach(self, link: Link, received: int) -> None:
        """Go on with this link, in place of the present one. The peer has all messages before `received`.

        Raises OSError if its connection is closed already.
        """
        self._drop_links()
        self.output.link = link
        self.polled = False
        self._resume.cancel()
        self.heartbeat.stop()
        self.heartbeat = Heartbeat(self, self._limits, self._pump.timers, self._idle_seconds)
        self.output.acknowledge_before(received)
        link.start(self)
        self.output.send_overdue(0)
        self._retransmission.set(self._times.retransmission)
        self._frames.on_room()
        self._frames.on_reachable()

    def collect(self, received: int) -> list[bytes]:
        """The peer polls: return the messages that wait for it, with their numbers. It has all before `received`."""
        self.polled = True
        self._resume.set(self.patience)
        self.output.acknowledge_before(received)
        waiting = self.output.collect(self._frames.outgoing, MAX_STREAM_MESSAGE)
        self._frames.on_room()
        self._frames.on_reachable()
        return waiting

    def attach_polling(self, link: Link) -> None:
        """Take what the peer sends on this link, on which it has polled. Raises OSError as `attach`."""
        self._drop_links()
        self.heartbeat.stop()
        self._polling = link
        link.start(self)

    def ask(self, association: bytes) -> None:
        """Poll the peer on the present link; `AssociationEvents.on_polled` is called then."""
        link = self.output.link
        if link is not None:
            link.ask(AttachRequest(association, resumed=True, received=self.inbox.next, fast_relay=False).encode())

    def hang_up(self, reason: str) -> None:
        """Close the link, and wait for another one."""
        link = self.output.link
        if link is not None:
            link.close()
            self.on_lost(link, reason)

    def read_on(self) -> None:
        """Read what is left in the link."""
        link = self.output.link or self._polling
        if link is not None:
            link.read()

    def close(self) -> None:
        """The association is over."""
        self.heartbeat.stop()
        self._resume.cancel()
        self._retransmission.cancel()
        self._drop_links()
        self.output.discard()

    def round_trip(self) -> float:
        """Seconds of a round trip on the link; infinity without one."""
        link = self.output.link
        return math.inf if link is None else link.round_trip()

    # Called by the link, see `LinkOwner`

    @property
    def must_wait(self) -> bool:
        """See `LinkOwner.must_wait`."""
        return self._frames.must_wait

    def use(self, cost: int) -> None:
        """See `LinkOwner.use`."""
        self._frames.use(cost)

    def on_streams(self, number: int, frames: memoryview) -> bool:
        """See `LinkOwner.on_streams`."""
        ready = self.inbox.receive(number, frames)
        self._frames.receive(ready or [])
        return ready is not None

    def on_acknowledged(self, number: int) -> None:
        """See `LinkOwner.on_acknowledged`."""
        self.output.acknowledge_before(number + 1)
        if self.output.is_ready:
            self._frames.on_room()
        if self.settled:
            self._events.on_settled()

    def on_request(self, request: MojoRequest) -> Value:
        """See `LinkOwner.on_request`: the peer polls again."""
        if canonical_kind(request.kind) != ARE_THERE_MESSAGES or not self.polled:
            raise RemoteProtocolError("unrecognized message type")
        return list(self.collect(AttachRequest.parse(request.body).received))

    def on_mail(self, body: Value) -> None:
        """See `LinkOwner.on_mail`: the peer has answered our poll."""
        messages = parse_mail(body).messages
        for envelope in messages:
            self.on_streams(*decode_streams(memoryview(envelope)))
        self._events.on_polled(len(messages))

    def on_writable(self) -> None:
        """See `LinkOwner.on_writable`."""
        self._frames.on_room()

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
        self._resume.set(self.patience)
        self._events.on_detached(reason)

    def on_stop(self) -> None:
        """See `LinkOwner.on_stop`."""
        self._frames.end("the relay stopped")

    # Called by the heartbeat, see `HeartbeatTarget`

    def send_ping(self) -> bool:
        """See `HeartbeatTarget.send_ping`: a message without frames, which the peer acknowledges."""
        output, link = self.output, self.output.link
        if link is None or not output.has_room:
            return False
        output.send(link, b"")
        link.flush()
        return True

    def on_unresponsive(self) -> None:
        """See `HeartbeatTarget.on_unresponsive`."""
        self._events.on_unresponsive()

    def on_dead(self, reason: str) -> None:
        """See `HeartbeatTarget.on_dead`."""
        self.hang_up(reason)

    # Internal

    def _drop_links(self) -> None:
        links = self.output.link, self._polling
        self.output.link = self._polling = None
        for link in links:
            if link is not None:
                link.close()

    def _on_not_resumed(self) -> None:
        self._frames.end(f"not connected again within {self.patience:g} s")

    def _on_overdue(self) -> None:
        self.output.send_overdue(self._times.retransmission)
        if self.attached:
            self._retransmission.set(self._times.retransmission)

    def _idle_seconds(self) -> float:
        link = self.output.link
        return 0.0 if link is None else link.idle_seconds()
