"""The relay service for EGTP nodes: passes opaque messages between nodes that cannot dial each other. No input or
output: requests in, bodies of responses out, and `message for you` through the `FastReceiver` of a connection.

    sender ──`pass this along`──► checks ──► mailbox of the recipient ──`message for you`──► its connection
                                                   └──◄ `are there messages`, `retrieve messages` ◄── a node that polls

How a port uses it. `sender` is always the node that the envelope proved; nothing here trusts an id inside a message but
that of the recipient.

1. For each request of a node: `body = service.on_request(sender, request, receiver)`. Send `response_to(request, ...,
   body)`, then call `service.on_room(receiver)`. None: the request is of another kind and yours to answer.
   `NotAllowedError`: send `failure_of(request, ..., str(error))`. `RemoteProtocolError`: the body is malformed; close
   the connection. `receiver` is the sender's connection if it could carry `message for you`, otherwise None.
2. When `FastReceiver.send_message` was called, note the message id that you return; when its response comes (or its
   request times out), call `service.on_response(receiver, message_id, succeeded)`.
3. When output of a receiver that returned None has been written: `service.on_room(receiver)`.
4. When a connection is gone, for whatever reason: `service.on_lost(receiver)`, once.
5. Call `service.expire()` at `service.next_expiry`, and `service.forget(node)` for a node that is not served any more.

Whose nodes may use the relay is decided by `owner_of(node)`: the credential of a node, or None for a node that is not
known; both sender and recipient must be known. `admit(credential)` takes a token of the credential's rate for each
request.

The loop guards of the original: a message is never passed to the relay itself, back to its sender, or to its recipient
by way of that recipient; and it is passed on to another relay only by a strategy with a strictly larger sequence number
than the strategy by which it came. The last needs `onward`; without it, and in tunneld so far, messages only go to
nodes that fetch them, and this relay dials no address that a node names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from tunneld.egtp.mailbox import Mailboxes, MailEvent, MailLimits, MailRefusal, MailRefusedError, StoredMessage
from tunneld.errors import NotAllowedError
from tunneld.wire.egtp.addresses import RelayStrategy, Strategy, lower_of, sequence_of
from tunneld.wire.egtp.ids import id_text
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import (
    ARE_THERE_MESSAGES,
    PASS_THIS_ALONG,
    RETRIEVE_MESSAGES,
    VERSION_WITH_MESSAGES,
    Mail,
    MailQuery,
    PassAlong,
    RetrieveMessages,
    WaitingMessage,
    canonical_kind,
    encode_retrieved,
    failure,
    parse_mail_query,
    parse_pass_along,
    parse_retrieve,
    success,
)
from tunneld.wire.mencode import Value

MAX_LISTED = 256
"""Messages in one response, or described in it: about 2 ms. A node asks again for the rest."""


@dataclass(frozen=True, slots=True)
class PassingLimits:
    """The limits of the relay service. `mail` are the quotas of stored messages."""

    mail: MailLimits = field(default_factory=MailLimits)

    max_message_bytes: int = 1024 * 1024
    "Bytes of the largest envelope that is passed on; it must fit into a frame of both connections."

    max_response_bytes: int = 1024 * 1024
    "Bytes of messages in one response. A single larger message is sent alone."

    fast_messages: int = 32
    "Messages that one connection may have been sent and not acknowledged."

    fast_bytes: int = 1024 * 1024
    "The same in bytes; one message is always allowed."


class FastReceiver(Protocol):
    """A connection that takes `message for you` requests. Compared by identity."""

    def send_message(self, node: bytes, envelope: bytes) -> bytes | None:
        """Send `node` a `message for you` request with this envelope, and return the id of the request. None: there is
        no room now, nothing was sent, and `PassingService.on_room` will be called. Must not call the service.
        """


class Onward(Protocol):
    """Passes messages to other relays."""

    def strategy_for(self, recipient: bytes) -> Strategy | None:
        """How a node that is not served here can be reached; None: not at all."""

    def pass_along(self, relay_id: bytes, body: PassAlong) -> None:
        """Ask another relay to pass a message along. Raises `MailRefusedError`."""


@dataclass(slots=True)
class _Delivery:
    """The fast relay of one connection: what was sent down it and is not acknowledged, by the id of the request."""

    node: bytes
    sent: dict[bytes, StoredMessage] = field(default_factory=dict)
    sent_bytes: int = 0


class PassingService:
    """Passes messages along for the nodes of a relay. See the top of this module. `own_ids` are those of the relay."""

    def __init__(
        self,
        own_ids: Collection[bytes],
        limits: Callable[[], PassingLimits],
        owner_of: Callable[[bytes], str | None],
        admit: Callable[[str], bool],
        now: Callable[[], float],
        onward: Onward | None = None,
    ) -> None:
        self._own_ids = own_ids
        self._limits = limits
        self._owner_of = owner_of
        self._admit = admit
        self._now = now
        self._onward = onward
        self._deliveries: dict[FastReceiver, _Delivery] = {}
        self._receivers: dict[bytes, FastReceiver] = {}  # by node: the connection that asked last
        self.mailboxes = Mailboxes(lambda: limits().mail)
        self.passed = 0  # messages that were accepted for a recipient
        self.delivered = 0  # of these: acknowledged, or fetched
        self.expired = 0  # of these: deleted because nothing fetched them
        self.refused: Counter[MailRefusal] = Counter()  # messages

    @property
    def next_expiry(self) -> float:
        """When to call `expire` next; infinity if nothing is stored."""
        return self.mailboxes.next_expiry

    def expire(self) -> None:
        """Delete messages that are too old."""
        self.expired += self.mailboxes.expire(self._now())

    def forget(self, node: bytes) -> None:
        """A node is not served any more: delete what waits for it."""
        if (receiver := self._receivers.get(node)) is not None:
            self.on_lost(receiver)
        self.mailboxes.drop(node)

    def knows(self, node: bytes) -> bool:
        """Whether a node may use the relay."""
        return self._owner_of(node) is not None

    def usage(self) -> dict[str, int | str | None]:
        """What is stored, and which credentials have sent it; and the limits of each credential."""
        stored, limits = self.mailboxes, self._limits().mail
        return {
            "mail_messages": stored.total.messages,
            "mail_bytes": stored.total.bytes,
            "mail_from": " ".join(f"{owner}:{used.messages}" for owner, used in sorted(stored.owners.items())) or None,
            "max_mail_messages": limits.credential_messages,
            "max_mail_bytes": limits.credential_bytes,
        }

    @property
    def max_message_bytes(self) -> int:
        """See `PassingLimits`."""
        return self._limits().max_message_bytes

    # Requests

    def on_request(self, sender: bytes, request: MojoRequest, receiver: FastReceiver | None) -> Value | None:
        """Execute a request of a node, and return the body of the response; None if it is of another kind.

        Raises `NotAllowedError` for a node that is not known or asks too often, `RemoteProtocolError` for a malformed
        body.
        """
        kind = canonical_kind(request.kind)
        if kind not in (PASS_THIS_ALONG, ARE_THERE_MESSAGES, RETRIEVE_MESSAGES):
            return None
        owner = self._owner_of(sender)
        if owner is None:
            raise NotAllowedError(f"node {id_text(sender)} is not known to this relay")
        is_admitted = self._admit(owner)
        too_many = f"rate limit reached: credential '{owner}' sends too many requests; try again later"
        if kind == PASS_THIS_ALONG:
            body = parse_pass_along(request.body)
            try:
                if not is_admitted:
                    raise MailRefusedError(MailRefusal.RATE, too_many)
                self._pass_along(sender, owner, body)
            except MailRefusedError as refusal:
                self.refused[refusal.kind] += 1
                return failure(str(refusal))
            self.passed += 1
            return success()
        if not is_admitted:
            raise NotAllowedError(too_many)
        if kind == ARE_THERE_MESSAGES:
            return self._mail(sender, parse_mail_query(request.body), receiver)
        return self._retrieve(sender, parse_retrieve(request.body))

    def _pass_along(self, sender: bytes, owner: str, body: PassAlong) -> None:
        """Store a message, or pass it on. Raises `MailRefusedError`."""
        largest = self._limits().max_message_bytes
        if len(body.message) > largest:
            reason = f"message of {len(body.message)} bytes is larger than {largest} bytes"
            raise MailRefusedError(MailRefusal.SIZE, reason)
        if body.recipient in self._own_ids:
            raise MailRefusedError(MailRefusal.CIRCLE, "a relay passes no messages to itself")
        if body.recipient == sender:
            raise MailRefusedError(MailRefusal.CIRCLE, "sender and recipient are the same node")
        recipient_owner = self._owner_of(body.recipient)
        if recipient_owner is None:
            self._pass_on(sender, body)
            return
        self.mailboxes.store(body.message, sender, owner, body.recipient, recipient_owner, self._now())
        self._deliver(body.recipient)

    def _pass_on(self, sender: bytes, body: PassAlong) -> None:
        """Pass a message on to another relay, unless it could come back. Raises `MailRefusedError`."""
        strategy = self._onward.strategy_for(body.recipient) if self._onward is not None else None
        recipient, circle = f"node {id_text(body.recipient)}", ""
        if self._onward is None or strategy is None:
            raise MailRefusedError(MailRefusal.UNKNOWN, f"{recipient} is not known to this relay")
        lower = lower_of(strategy)
        if not isinstance(lower, RelayStrategy):
            reason = f"{recipient} is not served by this relay, which dials no nodes"
            raise MailRefusedError(MailRefusal.UNKNOWN, reason)
        if lower.relay_id == body.recipient:
            circle = "a message is not passed to its recipient by way of the recipient"
        elif lower.relay_id == sender or lower.relay_id in self._own_ids:
            circle = "the message would be passed in a circle"
        elif sequence_of(strategy) <= body.sequence:
            circle = "no newer strategy for the recipient is known than that by which the message came"
        if circle:
            raise MailRefusedError(MailRefusal.CIRCLE, circle)
        self._onward.pass_along(lower.relay_id, PassAlong(body.recipient, body.message, sequence_of(strategy)))

    def _mail(self, node: bytes, query: MailQuery, receiver: FastReceiver | None) -> Value:
        if receiver is not None and not query.fast_relay:
            self.on_lost(receiver)
        elif receiver is not None and self._receivers.get(node) is not receiver:
            self._attach(node, receiver)
        messages = list(islice(self.mailboxes.waiting(node), MAX_LISTED))
        if query.response_version >= VERSION_WITH_MESSAGES:
            return Mail(messages=self._fetch(messages, self._limits().max_response_bytes, at_least=1)).encode()
        waiting = [WaitingMessage(message.sender, message.message_id, len(message.envelope)) for message in messages]
        return Mail(waiting=tuple(waiting)).encode()

    def _retrieve(self, node: bytes, body: RetrieveMessages) -> Value:
        found = {item.message_id: self.mailboxes.find(node, item.message_id) for item in body.wanted}
        messages = [message for message in found.values() if message is not None]
        return encode_retrieved(self._fetch(messages, min(body.max_bytes, self._limits().max_response_bytes)))

    def _fetch(self, messages: list[StoredMessage], most_bytes: int, at_least: int = 0) -> tuple[bytes, ...]:
        """Take messages out of their mailbox, in order, as long as they fit."""
        fetched: list[bytes] = []
        for message in messages:
            most_bytes -= len(message.envelope)
            if most_bytes < 0 and len(fetched) >= at_least:
                break
            self.mailboxes.move(message, MailEvent.FETCHED)
            fetched.append(message.envelope)
        self.delivered += len(fetched)
        return tuple(fetched)

    # Fast relay

    def on_response(self, receiver: FastReceiver, message_id: bytes, succeeded: bool) -> None:
        """A node has answered a `message for you`, or has not in time. After a failure, its messages wait again, and
        are not sent down this connection before it asks again.
        """
        delivery = self._deliveries.get(receiver)
        message = delivery.sent.pop(message_id, None) if delivery is not None else None
        if delivery is None or message is None:
            return
        delivery.sent_bytes -= len(message.envelope)
        if not succeeded:
            delivery.sent[message_id] = message
            self.on_lost(receiver)
            return
        self.mailboxes.move(message, MailEvent.DELIVERED)
        self.delivered += 1
        self._deliver(delivery.node)

    def on_room(self, receiver: FastReceiver | None) -> None:
        """The connection accepts output again, or a response was sent on it."""
        if receiver is not None and (delivery := self._deliveries.get(receiver)) is not None:
            self._deliver(delivery.node)

    def on_lost(self, receiver: FastReceiver) -> None:
        """The connection is gone: what was sent down it and is not acknowledged waits again. Harmless if repeated."""
        delivery = self._deliveries.pop(receiver, None)
        if delivery is not None:
            del self._receivers[delivery.node]
            for message in delivery.sent.values():
                self.mailboxes.move(message, MailEvent.RETURN)

    def _attach(self, node: bytes, receiver: FastReceiver) -> None:
        """Send messages for a node down this connection from now on, in place of an older one."""
        if (older := self._receivers.get(node)) is not None:
            self.on_lost(older)
        self.on_lost(receiver)  # it may have served another node
        self._receivers[node] = receiver
        self._deliveries[receiver] = _Delivery(node)

    def _deliver(self, node: bytes) -> None:
        receiver = self._receivers.get(node)
        if receiver is None:
            return
        delivery, limits = self._deliveries[receiver], self._limits()
        for message in self.mailboxes.waiting(node):
            size = len(message.envelope)
            if len(delivery.sent) >= limits.fast_messages:
                break
            if delivery.sent and delivery.sent_bytes + size > limits.fast_bytes:
                break
            message_id = receiver.send_message(node, message.envelope)
            if message_id is None:
                break
            self.mailboxes.move(message, MailEvent.SEND)
            delivery.sent[message_id] = message
            delivery.sent_bytes += size
