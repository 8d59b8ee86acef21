"""What a carrier sends: one numbered message for all frames of a turn, kept until the peer has acknowledged it."""

from __future__ import annotations

from collections.abc import Callable

from tunneld.egtp.link import Link
from tunneld.wire.egtp.delivery import Outbox
from tunneld.wire.egtp.envelope import encode_streams


class MessageOutput:
    """Sends the frames of one association, over the link that it has at the time. Implements
    `mux.send_buffer.FrameOutput`.
    """

    __slots__ = ("_now", "link", "outbox")

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is a clock in seconds."""
        self.link: Link | None = None
        self.outbox = Outbox()
        self._now = now

    @property
    def pending_output(self) -> int:
        """Bytes that wait in the link."""
        return self.link.pending_output if self.link is not None else 0

    @property
    def is_ready(self) -> bool:
        """Whether a message could be sent now."""
        link = self.link
        return link is not None and not link.blocked and not link.closed and self.outbox.has_room

    def write(self, outgoing: bytearray) -> bool:
        """Send `outgoing` as one message, unless the link or the outbox is full. Returns whether the kernel took it."""
        link = self.link
        if link is None or link.closed or not link.flush():
            return False
        if outgoing:
            if not self.outbox.has_room:
                return False
            self.send(link, outgoing)
            outgoing.clear()
        return link.flush()

    def send(self, link: Link, frames: bytes | bytearray) -> None:
        """Send one message; without frames, it only asks for a response."""
        envelope = encode_streams(self.outbox.next, frames)
        number = self.outbox.add(envelope, self._now())
        link.send_streams(number, envelope)

    def collect(self, outgoing: bytearray, max_octets: int) -> list[bytes]:
        """For a peer that polls: number `outgoing`, and return what it has not acknowledged, as far as it fits."""
        if outgoing and self.outbox.has_room:
            self.outbox.add(encode_streams(self.outbox.next, outgoing), self._now())
            outgoing.clear()
        return self.outbox.waiting(max_octets)

    def send_overdue(self, timeout: float) -> None:
        """Send again what was not acknowledged for `timeout` seconds; 0: all of it, since there is a new link."""
        link = self.link
        if link is not None:
            for message in self.outbox.overdue(self._now(), timeout):
                link.send_streams(message.number, message.frames)
            link.flush()
