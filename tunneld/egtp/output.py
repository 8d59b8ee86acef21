"""What an association sends: one numbered message for all frames of a turn, kept until the peer has acknowledged it."""

from __future__ import annotations

from collections.abc import Callable

from tunneld.egtp.link import Link
from tunneld.wire.egtp.delivery import Outbox
from tunneld.wire.egtp.envelope import encode_streams


class OutputBudget:
    """The memory that the associations of one owner may keep together for messages that were not acknowledged. Each may
    keep one message in any case, so that no association waits for another one.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = 1 << 62) -> None:
        """`limit` is in octets; without it, there is none."""
        self.limit = limit
        self.used = 0


class MessageOutput:
    """Sends the frames of one association, over the link that it has at the time. Implements
    `mux.send_buffer.FrameOutput`.
    """

    __slots__ = ("_budget", "_charged", "_now", "_on_waiting", "link", "outbox")

    def __init__(self, now: Callable[[], float], budget: OutputBudget, on_waiting: Callable[[], None]) -> None:
        """`now` is a clock in seconds; `on_waiting` is called when there is something to send, and no link."""
        self.link: Link | None = None
        self.outbox = Outbox()
        self._budget = budget
        self._charged = 0  # octets of ours that the budget counts
        self._now = now
        self._on_waiting = on_waiting

    @property
    def pending_output(self) -> int:
        """Bytes that wait in the link."""
        return self.link.pending_output if self.link is not None else 0

    @property
    def has_room(self) -> bool:
        """Whether a message more may be kept."""
        return self.outbox.has_room and (self.outbox.is_empty or self._budget.used < self._budget.limit)

    @property
    def is_ready(self) -> bool:
        """Whether a message could be sent now."""
        link = self.link
        return link is not None and not link.blocked and not link.closed and self.has_room

    def write(self, outgoing: bytearray) -> bool:
        """Send `outgoing` as one message, unless the link or the outbox is full. Returns whether the kernel took it."""
        link = self.link
        if link is None:
            if outgoing:
                self._on_waiting()
            return False
        if link.closed or not link.flush():
            return False
        if outgoing:
            if not self.has_room:
                return False
            self.send(link, outgoing)
            outgoing.clear()
        return link.flush()

    def send(self, link: Link, frames: bytes | bytearray) -> None:
        """Send one message; without frames, it only asks for a response."""
        envelope = encode_streams(self.outbox.next, frames)
        link.send_streams(self._keep(envelope), envelope)

    def collect(self, outgoing: bytearray, max_octets: int) -> list[bytes]:
        """For a peer that polls: number `outgoing`, and return what it has not acknowledged, as far as it fits."""
        if outgoing and self.has_room:
            self._keep(encode_streams(self.outbox.next, outgoing))
            outgoing.clear()
        return self.outbox.waiting(max_octets)

    def send_overdue(self, timeout: float) -> None:
        """Send again what was not acknowledged for `timeout` seconds; 0: all of it, since there is a new link."""
        link = self.link
        if link is not None:
            for message in self.outbox.overdue(self._now(), timeout):
                link.send_streams(message.number, message.frames)
            link.flush()

    def acknowledge_before(self, number: int) -> None:
        """The peer has every message before this one."""
        self.outbox.acknowledge_before(number)
        self._charge(self.outbox.octets)

    def discard(self) -> None:
        """The association is over: keep nothing."""
        self.outbox = Outbox()
        self._charge(0)

    def _keep(self, envelope: bytes) -> int:
        number = self.outbox.add(envelope, self._now())
        self._charge(self.outbox.octets)
        return number

    def _charge(self, octets: int) -> None:
        self._budget.used += octets - self._charged
        self._charged = octets
