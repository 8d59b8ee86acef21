"""Messages that wait at the relay for EGTP nodes: opaque, in memory, within quotas. No input or output.

    state     SEND    RETURN    DELIVERED   FETCHED   EXPIRED
    WAITING   SENT    -         -           GONE      GONE
    SENT      -       WAITING   GONE        -         GONE

SENT is a message that was sent down a connection of its recipient and is not acknowledged: if that connection is lost,
the message waits again, in its old place. So it is delivered at least once by fast relay. Fetching with a poll deletes
it with the response, as in the original; a response that is lost takes its messages along.

Every message counts for the credential of its sender, and for its recipient. Another credential than the recipient's
own may fill half a mailbox, so that no sender alone can shut out all others. A relay that is restarted has no messages.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from tunneld.errors import LimitReachedError
from tunneld.wire.egtp.ids import id_of

MESSAGE_COST = 512
"""Bytes that a stored message costs in addition to its own."""

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class MailLimits:
    """The limits of stored messages. Bytes include `MESSAGE_COST` for each message; ages are in seconds."""

    credential_messages: int = 1000
    "Messages that the nodes of one credential have sent and that still wait."

    credential_bytes: int = 16 * MIB
    "The same in bytes: a few of the largest messages, or a thousand usual ones."

    mailbox_messages: int = 1000
    "Messages that wait for one node."

    mailbox_bytes: int = 8 * MIB
    "The same in bytes."

    total_bytes: int = 128 * MIB
    "All messages together: memory of the relay."

    max_age: float = 3600.0
    "A message that was not fetched is deleted: an EGTP request is given up after an hour at the latest."


class MailState(Enum):
    """The state of a stored message."""

    WAITING = auto()
    SENT = auto()
    GONE = auto()


class MailEvent(Enum):
    """What can happen to a stored message."""

    SEND = auto()
    RETURN = auto()
    DELIVERED = auto()
    FETCHED = auto()
    EXPIRED = auto()


TRANSITIONS = {
    (MailState.WAITING, MailEvent.SEND): MailState.SENT,
    (MailState.WAITING, MailEvent.FETCHED): MailState.GONE,
    (MailState.WAITING, MailEvent.EXPIRED): MailState.GONE,
    (MailState.SENT, MailEvent.RETURN): MailState.WAITING,
    (MailState.SENT, MailEvent.DELIVERED): MailState.GONE,
    (MailState.SENT, MailEvent.EXPIRED): MailState.GONE,
}


class MailRefusal(Enum):
    """Why a message is refused; the values are labels of metrics."""

    RATE = "rate"  # the credential makes too many requests
    SIZE = "size"
    CREDENTIAL = "credential"  # its nodes have sent too much that still waits
    MAILBOX = "mailbox"  # too much waits for the recipient
    MEMORY = "memory"  # too much waits in all mailboxes
    UNKNOWN = "unknown"  # the recipient
    CIRCLE = "circle"  # it would come back


class MailRefusedError(LimitReachedError):
    """A message is the sender's to keep."""

    def __init__(self, kind: MailRefusal, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(slots=True, eq=False)
class StoredMessage:
    """An envelope on its way from a node of the credential `owner` to `recipient`."""

    sender: bytes
    owner: str
    recipient: bytes
    envelope: bytes
    arrived: float
    message_id: bytes
    state: MailState = MailState.WAITING

    @property
    def cost(self) -> int:
        """Bytes that it counts."""
        return len(self.envelope) + MESSAGE_COST


@dataclass(slots=True)
class MailUsage:
    """Messages that are stored, and their bytes."""

    messages: int = 0
    bytes: int = 0

    def count(self, message: StoredMessage, sign: int) -> None:
        """Add (+1) or subtract (-1) a message."""
        self.messages += sign
        self.bytes += sign * message.cost

    def check(self, message: StoredMessage, most_messages: int, most_bytes: int, kind: MailRefusal, what: str) -> None:
        """Raise `MailRefusedError` if there is no room for one message more."""
        if self.messages >= most_messages:
            raise MailRefusedError(kind, f"{what} limit reached: {self.messages} of {most_messages} messages wait")
        if self.bytes + message.cost > most_bytes:
            raise MailRefusedError(kind, f"{what} limit reached: {self.bytes} of {most_bytes} bytes are in use")


@dataclass(slots=True)
class _Mailbox:
    """What is stored for one node: oldest first, by message id."""

    messages: dict[bytes, StoredMessage] = field(default_factory=dict)
    usage: MailUsage = field(default_factory=MailUsage)
    by_owner: Counter[str] = field(default_factory=Counter)  # bytes, by the credential of the sender


class Mailboxes:
    """All stored messages. `limits` is asked at each use, since a reload may change it."""

    def __init__(self, limits: Callable[[], MailLimits]) -> None:
        self._limits = limits
        self._mailboxes: dict[bytes, _Mailbox] = {}
        # oldest first; looking for the first item of a dict takes longer with each item that was removed before it
        self._by_age: OrderedDict[StoredMessage, None] = OrderedDict()
        self._by_owner: dict[str, MailUsage] = {}
        self.total = MailUsage()

    def usage(self, owner: str) -> MailUsage:
        """What the nodes of a credential have sent and is still stored. Do not change it."""
        return self._by_owner.get(owner) or MailUsage()

    @property
    def owners(self) -> Mapping[str, MailUsage]:
        """What is stored, by the credential whose nodes have sent it."""
        return self._by_owner

    def store(
        self, envelope: bytes, sender: bytes, owner: str, recipient: bytes, recipient_owner: str, now: float
    ) -> StoredMessage:
        """Store a message. An envelope that is stored already is stored once: it was sent again.

        Raises `MailRefusedError`.
        """
        limits = self._limits()
        message = StoredMessage(sender, owner, recipient, envelope, now, id_of(envelope))
        mailbox = self._mailboxes.get(recipient) or _Mailbox()
        known = mailbox.messages.get(message.message_id)
        if known is not None:
            if known.envelope != envelope:  # a collision of SHA-1
                raise MailRefusedError(MailRefusal.MAILBOX, "mailbox has another message with the same id")
            return known
        used = self._by_owner.get(owner) or MailUsage()
        sent, bytes_sent = limits.credential_messages, limits.credential_bytes
        used.check(message, sent, bytes_sent, MailRefusal.CREDENTIAL, f"credential '{owner}'")
        mailbox.usage.check(message, limits.mailbox_messages, limits.mailbox_bytes, MailRefusal.MAILBOX, "mailbox")
        if owner != recipient_owner and mailbox.by_owner[owner] + message.cost > limits.mailbox_bytes // 2:
            reason = f"mailbox limit reached: credential '{owner}' may fill half of it"
            raise MailRefusedError(MailRefusal.MAILBOX, reason)
        self.total.check(message, limits.total_bytes, limits.total_bytes, MailRefusal.MEMORY, "relay")
        self._mailboxes[recipient], self._by_owner[owner] = mailbox, used
        mailbox.messages[message.message_id] = message
        self._by_age[message] = None
        self._count(message, 1)
        return message

    def waiting(self, recipient: bytes) -> Iterator[StoredMessage]:
        """The messages that wait for a node, oldest first. During the iteration, only SEND is allowed."""
        mailbox = self._mailboxes.get(recipient)
        if mailbox is not None:
            yield from (message for message in mailbox.messages.values() if message.state is MailState.WAITING)

    def find(self, recipient: bytes, message_id: bytes) -> StoredMessage | None:
        """The message for a node with this id, if it waits."""
        mailbox = self._mailboxes.get(recipient)
        message = mailbox.messages.get(message_id) if mailbox is not None else None
        return message if message is not None and message.state is MailState.WAITING else None

    def move(self, message: StoredMessage, event: MailEvent) -> None:
        """Apply an event. A message that is gone already stays so: its acknowledgement came late."""
        if message.state is MailState.GONE:
            return
        message.state = TRANSITIONS[message.state, event]
        if message.state is MailState.GONE:
            del self._by_age[message]
            del self._mailboxes[message.recipient].messages[message.message_id]
            self._count(message, -1)

    @property
    def next_expiry(self) -> float:
        """When to call `expire` next; infinity if nothing is stored."""
        oldest = next(iter(self._by_age), None)
        return math.inf if oldest is None else oldest.arrived + self._limits().max_age

    def expire(self, now: float) -> int:
        """Delete messages that are too old; returns how many."""
        deleted = 0
        while self.next_expiry <= now:
            self.move(next(iter(self._by_age)), MailEvent.EXPIRED)
            deleted += 1
        return deleted

    def drop(self, recipient: bytes) -> int:
        """Delete all messages for a node that this relay does not serve any more; returns how many."""
        mailbox = self._mailboxes.get(recipient)
        messages = list(mailbox.messages.values()) if mailbox is not None else []
        for message in messages:
            self.move(message, MailEvent.EXPIRED)
        return len(messages)

    def _count(self, message: StoredMessage, sign: int) -> None:
        mailbox, used = self._mailboxes[message.recipient], self._by_owner[message.owner]
        for usage in (mailbox.usage, used, self.total):
            usage.count(message, sign)
        mailbox.by_owner[message.owner] += sign * message.cost
        if not mailbox.by_owner[message.owner]:
            del mailbox.by_owner[message.owner]
        if not mailbox.messages:
            del self._mailboxes[message.recipient]
        if not used.messages:
            del self._by_owner[message.owner]
