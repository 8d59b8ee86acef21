"""Numbered messages: each arrives once and in order, although the way between two nodes loses, repeats and reorders
them. Pure; the time is an argument.

    sender     Outbox   keeps each message until it is acknowledged, and says which are to be sent again
    receiver   Inbox    keeps what came too early, drops what came before

The response to a message acknowledges it and all before it: the receiver has them. So it need not answer each, only the
last that it got in a turn, and those that come again. Responses may get lost and come late: the message is sent again
then, and the second response has no effect. An early message is not answered, whether it was kept or not, so it comes
again, too.

Numbers begin with 0 in each direction of an association. At most `WINDOW` messages, beginning with the first that is
not acknowledged, are under way.
"""

from __future__ import annotations

WINDOW = 1024
"""Messages that may be sent beyond the first that is not acknowledged. With one message for each turn of a busy event
loop (some 5000 a second) that is enough for a round trip of 200 ms; then messages become larger.
"""
MAX_UNACKNOWLEDGED = 8 * 1024 * 1024
"""Octets of messages that may be unacknowledged, as what a stream has in flight at 600 Mbit/s over 100 ms."""
MAX_EARLY = 4 * 1024 * 1024
"""Octets that an inbox keeps because an earlier message has not come. What has no room comes again."""


class SentMessage:
    """A message that was not acknowledged yet."""

    __slots__ = ("frames", "number", "sent_at")

    def __init__(self, number: int, frames: bytes, sent_at: float) -> None:
        self.number = number
        self.frames = frames
        self.sent_at = sent_at


class Outbox:
    """The messages of one direction, at their sender."""

    def __init__(self, max_octets: int = MAX_UNACKNOWLEDGED) -> None:
        self.next = 0  # the number of the next message
        self.octets = 0  # of messages that are not acknowledged
        self._unacknowledged: dict[int, SentMessage] = {}  # by number, ascending
        self._max_octets = max_octets

    @property
    def has_room(self) -> bool:
        """Whether `add` may be called."""
        if not self._unacknowledged:
            return True
        return self.octets < self._max_octets and self.next - self._first < WINDOW

    @property
    def is_empty(self) -> bool:
        """Whether every message is acknowledged."""
        return not self._unacknowledged

    @property
    def _first(self) -> int:
        return next(iter(self._unacknowledged))

    def add(self, frames: bytes, now: float) -> int:
        """Number a message that is sent now."""
        number = self.next
        self.next += 1
        self._unacknowledged[number] = SentMessage(number, frames, now)
        self.octets += len(frames)
        return number

    def acknowledge_before(self, number: int) -> None:
        """The peer has every message before this one. It may have said so before."""
        while self._unacknowledged and self._first < number:
            self.octets -= len(self._unacknowledged.pop(self._first).frames)

    def waiting(self, max_octets: int) -> list[bytes]:
        """The first messages that are not acknowledged: at least one if there is one, and no more than fit."""
        found: list[bytes] = []
        for message in self._unacknowledged.values():
            max_octets -= len(message.frames)
            if found and max_octets < 0:
                break
            found.append(message.frames)
        return found

    def overdue(self, now: float, timeout: float) -> list[SentMessage]:
        """The messages to be sent again: no response came for `timeout` seconds. They count as sent now."""
        found = [message for message in self._unacknowledged.values() if now - message.sent_at >= timeout]
        for message in found:
            message.sent_at = now
        return found


Received = bytes | memoryview
"""What was received; its memory must stay as it is."""


class Inbox:
    """The messages of one direction, at their receiver."""

    def __init__(self, max_octets: int = MAX_EARLY) -> None:
        self.next = 0  # the number that is delivered next
        self._early: dict[int, Received] = {}
        self._octets = 0
        self._max_octets = max_octets

    def receive(self, number: int, frames: Received) -> list[Received] | None:
        """Take a message. Returns what is to be delivered now, in order, nothing for one that came before; None: it is
        early, and not to be answered.
        """
        if number == self.next:
            self.next += 1
            return [frames, *self._following()] if self._early else [frames]
        if number < self.next:
            return []
        has_room = number < self.next + WINDOW and self._octets + len(frames) <= self._max_octets
        if has_room and number not in self._early:
            self._early[number] = frames
            self._octets += len(frames)
        return None

    def _following(self) -> list[Received]:
        found = []
        while (frames := self._early.pop(self.next, None)) is not None:
            self._octets -= len(frames)
            self.next += 1
            found.append(frames)
        return found
