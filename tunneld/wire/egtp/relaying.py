"""The bodies of the messages with which relays pass envelopes on to nodes that cannot be dialled. Pure.

    from       type                       body                                     response
    sender     pass this along v2         {'recipient', 'message',                 success or failure
                                           'comm strat sequence num'}
    recipient  are there messages v2      {'response version', 'enable fast        the messages, or information about
                                           relay'}                                 them, or {'result': 'no'}
    recipient  retrieve messages v2       {'messages': information, 'bytes'}       the messages, or {'status':
                                                                                   'no messages'}
    relay      message for you            the message, or {'message': it}          success

`success` is `{'result': 'success'}` (once `ok`), `failure` is `{'result': 'failure', 'reason'}`. A message is an
envelope, opaque to the relay. The messages are a list of octet strings; each may also be `{'message': it}`, and the
list the value of 'messages', 'messages attached' or 'messages attached v2'. Information is a list of `{'sender id',
'message id', 'length'}`; the message id is the SHA-1 of the envelope, since a relay knows nothing else.

Types without ` v2` are synonyms. The server side of 2002 is lost; it was reconstructed from the client, which accepts
all these forms. As a relay we send messages to a recipient with 'response version' 3 (what the client of 2002 asks for)
or later, and information to an older one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.addresses import NO_SEQUENCE
from tunneld.wire.egtp.fields import Dictionary, as_dictionary, id_at, integer_at, list_at, octets_at
from tunneld.wire.egtp.ids import to_sixbit
from tunneld.wire.mencode import Value

PASS_THIS_ALONG = b"pass this along v2"
ARE_THERE_MESSAGES = b"are there messages v2"
RETRIEVE_MESSAGES = b"retrieve messages v2"
MESSAGE_FOR_YOU = b"message for you"

VERSION_WITH_MESSAGES = 3
"""The 'response version' from which on a recipient wants the messages themselves."""

MAX_MESSAGES = 4096
"""Messages in one response: each costs the reader three values."""

_SYNONYMS = {
    kind.removesuffix(b" v2"): kind
    for kind in (PASS_THIS_ALONG, ARE_THERE_MESSAGES, RETRIEVE_MESSAGES, b"list relay servers v2")
}
_BUNDLES = (b"messages", b"messages attached", b"messages attached v2")


def canonical_kind(kind: bytes) -> bytes:
    """The message type of which `kind` may be a synonym."""
    return _SYNONYMS.get(kind, kind)


def success() -> Value:
    """The body of the response after success."""
    return {b"result": b"success"}


def failure(reason: str) -> Value:
    """The body of the response after a failure, with its reason for people."""
    return {b"result": b"failure", b"reason": reason.encode()}


def parse_outcome(body: Value) -> str | None:
    """The reason in a response that tells success or failure; None after success. Raises `RemoteProtocolError`."""
    fields = as_dictionary(body, "the response")
    match octets_at(fields, b"result"):
        case b"success" | b"ok":
            return None
        case b"failure":
            return octets_at(fields, b"reason").decode(errors="replace") if b"reason" in fields else "no reason given"
    raise RemoteProtocolError("EGTP message: 'result' must be 'success' or 'failure'")


@dataclass(frozen=True, slots=True)
class PassAlong:
    """The body of `pass this along`: a message for a recipient.

    `sequence` is the sequence number of the strategy by which the sender reached the relay; the relay may only use
    strategies with larger ones, so that no message goes in circles.
    """

    recipient: bytes
    message: bytes
    sequence: int = NO_SEQUENCE

    def encode(self) -> Value:
        """The body."""
        recipient = to_sixbit(self.recipient)
        return {b"recipient": recipient, b"message": self.message, b"comm strat sequence num": self.sequence}


def parse_pass_along(body: Value) -> PassAlong:
    """Parse the body of `pass this along`. Raises `RemoteProtocolError`."""
    fields = as_dictionary(body, "the body")
    sequence = integer_at(fields, b"comm strat sequence num", 0, NO_SEQUENCE)
    return PassAlong(id_at(fields, b"recipient"), octets_at(fields, b"message"), sequence)


@dataclass(frozen=True, slots=True)
class MailQuery:
    """The body of `are there messages`. With fast relay, the relay may send `message for you` down the connection."""

    response_version: int = VERSION_WITH_MESSAGES
    fast_relay: bool = True

    def encode(self) -> Value:
        """The body."""
        return {b"response version": self.response_version, b"enable fast relay": int(self.fast_relay)}


def parse_mail_query(body: Value) -> MailQuery:
    """Parse the body of `are there messages`. Raises `RemoteProtocolError`."""
    fields = as_dictionary(body, "the body")
    version = integer_at(fields, b"response version", 0, 0)
    return MailQuery(version, integer_at(fields, b"enable fast relay", 0, 0) != 0)


@dataclass(frozen=True, slots=True)
class WaitingMessage:
    """Information about a message that waits at a relay. `length` is in octets."""

    sender: bytes
    message_id: bytes
    length: int

    def encode(self) -> Value:
        """The item of 'messages info'."""
        sender, message_id = to_sixbit(self.sender), to_sixbit(self.message_id)
        return {b"sender id": sender, b"message id": message_id, b"length": self.length}


def _parse_waiting(value: Value) -> WaitingMessage:
    fields = as_dictionary(value, "an item of 'messages info'")
    return WaitingMessage(id_at(fields, b"sender id"), id_at(fields, b"message id"), integer_at(fields, b"length", 0))


@dataclass(frozen=True, slots=True)
class Mail:
    """The response to `are there messages` or `retrieve messages`: messages, or what waits, or neither."""

    messages: tuple[bytes, ...] = ()
    waiting: tuple[WaitingMessage, ...] = ()

    def encode(self) -> Value:
        """The body of the response to `are there messages`."""
        if self.messages:
            return list(self.messages)
        if not self.waiting:
            return {b"result": b"no"}
        return {
            b"result": b"yes",
            b"number of messages": len(self.waiting),
            b"total bytes": sum(item.length for item in self.waiting),
            b"messages info": [item.encode() for item in self.waiting],
        }


def encode_retrieved(messages: Iterable[bytes]) -> Value:
    """The body of the response to `retrieve messages`."""
    bodies: list[Value] = list(messages)
    return bodies or {b"status": b"no messages"}


def parse_mail(body: Value) -> Mail:
    """Parse the response to `are there messages` or `retrieve messages`, in any form. Raises `RemoteProtocolError`."""
    if isinstance(body, list):
        return Mail(_parse_messages({b"messages": body}, b"messages"))
    fields = as_dictionary(body, "the response")
    for key in _BUNDLES:
        if key in fields:
            return Mail(_parse_messages(fields, key))
    if fields.get(b"result") == b"yes":
        # 'messages info' is optional in the original; without it there is nothing to ask for by id
        items = list_at(fields, b"messages info", MAX_MESSAGES) if b"messages info" in fields else []
        return Mail(waiting=tuple(map(_parse_waiting, items)))
    if fields.get(b"result") == b"no" or fields.get(b"status") == b"no messages":
        return Mail()
    raise RemoteProtocolError("EGTP message: the response has neither messages nor information about them")


def _parse_messages(fields: Dictionary, key: bytes) -> tuple[bytes, ...]:
    return tuple(map(parse_message_for_you, list_at(fields, key, MAX_MESSAGES)))


@dataclass(frozen=True, slots=True)
class RetrieveMessages:
    """The body of `retrieve messages`: what is wanted, and at most how many bytes of it."""

    wanted: tuple[WaitingMessage, ...]
    max_bytes: int

    def encode(self) -> Value:
        """The body."""
        return {b"messages": [item.encode() for item in self.wanted], b"bytes": self.max_bytes}


def parse_retrieve(body: Value) -> RetrieveMessages:
    """Parse the body of `retrieve messages`. Raises `RemoteProtocolError`."""
    fields = as_dictionary(body, "the body")
    wanted = tuple(map(_parse_waiting, list_at(fields, b"messages", MAX_MESSAGES)))
    return RetrieveMessages(wanted, integer_at(fields, b"bytes", 0))


def parse_message_for_you(body: Value) -> bytes:
    """The envelope in a `message for you`, or in a list of messages. Raises `RemoteProtocolError`."""
    if isinstance(body, bytes):
        return body
    return octets_at(as_dictionary(body, "a message"), b"message")
