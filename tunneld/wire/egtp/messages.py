"""The messages of EGTP v1 ("mojo messages"): requests and responses. Pure.

    request   {'header': {'protocol', 'message type': T, 'recipient', 'nonce' [, 'freshness proof']},
               'message body': {'mojo header': {...}, 'mojo message': BODY} [, 'metainfo']}
    response  {'header': {'protocol', 'message type': T + ' response', 'reference', 'freshness proof'},
               'message body': {'mojo message': BODY [, 'mojo header']} [, 'metainfo', 'extra_metainfo']}

A message with a nonce is a request; `recipient` and `nonce` are 20 octets. The `reference` of a response is the id of
its request. The freshness proof is the id of the last message received from the peer; without one, the key is missing
in a request and null in a response. The original sends it but never checks it, so a request that is replayed is
executed again: envelopes must prevent that, and the one of 2002 does not.

A failure of the transport is told in the mojo header: `{'result': 'failure', 'reason': ...}`. There is no other
acknowledgement than the response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntFlag

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.fields import Dictionary, as_dictionary, dictionary_at, octets_at
from tunneld.wire.egtp.ids import ID_OCTETS
from tunneld.wire.mencode import DEFAULT_LIMITS, MencodeLimits, Value, decode, encode

PROTOCOL = b"Mojo v0.9991"
RESPONSE = b" response"
"""The end of the type of every response."""

MAX_KIND = 64
"""Octets of a message type: types are logged and looked up."""

_VERSION = re.compile(rb"Mojo v(0\.99[0-9]{0,6}|1(\.[0-9]{1,8})?)")
"""Versions from 0.99 to below 2.0, which the original accepts."""


class MessageHint(IntFlag):
    """What a sender knows about the messages to come; it decides how long a connection is kept."""

    RESPONSE_EXPECTED = 1
    MORE_TO_COME = 2
    NOTHING_MORE = 4
    WILL_RESPOND = 8
    IS_RESPONSE = 16


@dataclass(frozen=True, slots=True)
class MojoRequest:
    """A request. `kind` is the message type; `nonce` are 20 random octets; `metainfo` is the sender's address."""

    kind: bytes
    recipient: bytes
    nonce: bytes
    body: Value
    freshness: bytes | None = None
    header: Dictionary = field(default_factory=dict)
    metainfo: Value = None

    def encode(self) -> bytes:
        """The mencoded request; its id is `id_of` that."""
        head: Dictionary = {
            b"protocol": PROTOCOL,
            b"message type": self.kind,
            b"recipient": self.recipient,
            b"nonce": self.nonce,
        }
        if self.freshness is not None:
            head[b"freshness proof"] = self.freshness
        message: Dictionary = {
            b"header": head,
            b"message body": {b"mojo header": self.header, b"mojo message": self.body},
        }
        if self.metainfo is not None:
            message[b"metainfo"] = self.metainfo
        return encode(message)


@dataclass(frozen=True, slots=True)
class MojoResponse:
    """A response to the request with the id `reference`. `kind` ends in ` response`."""

    kind: bytes
    reference: bytes
    body: Value
    freshness: bytes | None = None
    header: Dictionary = field(default_factory=dict)
    metainfo: Value = None
    extra_metainfo: Value = None

    @property
    def failure(self) -> str | None:
        """The reason of a failure told in the mojo header; None if there is none."""
        if self.header.get(b"result") != b"failure":
            return None
        reason = self.header.get(b"reason")
        return reason.decode(errors="replace") if isinstance(reason, bytes) and reason else "no reason given"

    def encode(self) -> bytes:
        """The mencoded response."""
        contents: Dictionary = {b"mojo message": self.body}
        if self.header:
            contents[b"mojo header"] = self.header
        message: Dictionary = {
            b"header": {
                b"protocol": PROTOCOL,
                b"message type": self.kind,
                b"reference": self.reference,
                b"freshness proof": self.freshness,
            },
            b"message body": contents,
        }
        if self.metainfo is not None:
            message[b"metainfo"] = self.metainfo
        if self.extra_metainfo is not None:
            message[b"extra_metainfo"] = self.extra_metainfo
        return encode(message)


def response_to(request: MojoRequest, request_id: bytes, body: Value, freshness: bytes | None = None) -> MojoResponse:
    """The response to a request that was received with the id `request_id`."""
    return MojoResponse(request.kind + RESPONSE, request_id, body, freshness)


def failure_of(request: MojoRequest, request_id: bytes, reason: str, freshness: bytes | None = None) -> MojoResponse:
    """The response to a request that cannot be executed at all, such as one of an unknown type."""
    header: Dictionary = {b"result": b"failure", b"reason": reason.encode()}
    return MojoResponse(request.kind + RESPONSE, request_id, None, freshness, header)


def parse_message(data: bytes, limits: MencodeLimits = DEFAULT_LIMITS) -> MojoRequest | MojoResponse:
    """Parse a mencoded message. Raises `RemoteProtocolError`.

    The caller checks that a request's `recipient` is its own id, and looks up a response's request (`requests`).
    """
    message = as_dictionary(decode(data, limits), "the message")
    head = dictionary_at(message, b"header")
    contents = dictionary_at(message, b"message body")
    if not _VERSION.fullmatch(protocol := octets_at(head, b"protocol")):
        raise RemoteProtocolError(f"EGTP message: protocol {ascii(protocol[:40])[1:]} is not Mojo v0.99 to v1.x")
    kind = octets_at(head, b"message type")
    if not 0 < len(kind) <= MAX_KIND:
        raise RemoteProtocolError(f"EGTP message: 'message type' must have 1 to {MAX_KIND} octets")
    freshness = octets_at(head, b"freshness proof", ID_OCTETS) if head.get(b"freshness proof") is not None else None
    header = dictionary_at(contents, b"mojo header") if b"mojo header" in contents else {}
    metainfo = message.get(b"metainfo")
    if b"nonce" in head:
        nonce, recipient = octets_at(head, b"nonce", ID_OCTETS), octets_at(head, b"recipient", ID_OCTETS)
        if b"mojo message" not in contents:
            raise RemoteProtocolError("EGTP message: a request must have a 'mojo message'")
        return MojoRequest(kind, recipient, nonce, contents[b"mojo message"], freshness, header, metainfo)
    reference = octets_at(head, b"reference", ID_OCTETS)
    if not kind.endswith(RESPONSE):
        raise RemoteProtocolError("EGTP message: the type of a response must end in ' response'")
    body, extra = contents.get(b"mojo message"), message.get(b"extra_metainfo")
    return MojoResponse(kind, reference, body, freshness, header, metainfo, extra)
