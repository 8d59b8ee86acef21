"""The two mojo messages that carry streams, encoded and decoded by their fixed beginnings. Pure.

    request    message for you            {'message': a streams envelope}
    response   message for you response   {'result': 'success'}

A busy event loop sends one of each per turn, and `mencode` takes many times as long. Both are exactly what it makes: a
message that is encoded otherwise, though validly, is decoded by `messages`.

In a modern session the id of a request is its nonce, which is as unique as the hash of the whole message. TLS protects
the message already, and hashing it once more at both ends would take as long as everything else together.
"""

from __future__ import annotations

from tunneld.wire.egtp.envelope import ID_SIZE


def _atom(data: bytes) -> bytes:
    return b"%d:%b" % (len(data), data)


def _string(data: bytes) -> bytes:
    return b"(6:string%b)" % _atom(data)


_VERSION = _string(b"protocol") + _string(b"Mojo v0.9991")
_REQUEST_START = b"(4:dict%b(4:dict%b%b%b(6:string20:" % (
    _string(b"header"),
    _string(b"message type"),
    _string(b"message for you"),
    _string(b"nonce"),
)
_RECIPIENT = b")%b%b(6:string20:" % (_VERSION, _string(b"recipient"))
_BODY = b"))%b(4:dict%b(4:dict)%b(4:dict%b(6:string" % (
    _string(b"message body"),
    _string(b"mojo header"),
    _string(b"mojo message"),
    _string(b"message"),
)
_REQUEST_END = b"))))"
_RESPONSE_START = b"(4:dict%b(4:dict%b(6:string20:" % (_string(b"header"), _string(b"freshness proof"))
_RESPONSE_MIDDLE = b")%b%b%b%b(6:string20:" % (
    _string(b"message type"),
    _string(b"message for you response"),
    _VERSION,
    _string(b"reference"),
)
_RESPONSE_END = b"))%b(4:dict%b(4:dict%b%b)))" % (
    _string(b"message body"),
    _string(b"mojo message"),
    _string(b"result"),
    _string(b"success"),
)
_NONCE_AT = len(_REQUEST_START)
_RECIPIENT_AT = _NONCE_AT + ID_SIZE
_ID_AT = _RECIPIENT_AT + len(_RECIPIENT)
_BODY_AT = _ID_AT + ID_SIZE
_LENGTH_AT = _BODY_AT + len(_BODY)
_MAX_LENGTH_DIGITS = 7
_PROOF_AT = len(_RESPONSE_START)
_MIDDLE_AT = _PROOF_AT + ID_SIZE
_REFERENCE_AT = _MIDDLE_AT + len(_RESPONSE_MIDDLE)
_RESPONSE_SIZE = _REFERENCE_AT + ID_SIZE + len(_RESPONSE_END)


def encode_for_you(recipient: bytes, nonce: bytes, envelope: bytes) -> bytes:
    """The request `message for you` with this envelope."""
    length = b"%d:" % len(envelope)
    return b"".join((_REQUEST_START, nonce, _RECIPIENT, recipient, _BODY, length, envelope, _REQUEST_END))


def decode_for_you(message: memoryview, recipient: bytes) -> tuple[bytes, memoryview] | None:
    """The nonce of a request `message for you` to this node, and the envelope in it; None if it is another message or
    encoded otherwise.
    """
    if (
        message[:_NONCE_AT] != _REQUEST_START
        or message[_RECIPIENT_AT:_ID_AT] != _RECIPIENT
        or message[_ID_AT:_BODY_AT] != recipient
        or message[_BODY_AT:_LENGTH_AT] != _BODY
    ):
        return None
    digits, colon, _ = bytes(message[_LENGTH_AT : _LENGTH_AT + _MAX_LENGTH_DIGITS + 1]).partition(b":")
    if not colon or not digits.isdigit() or (digits[0] == 48 and len(digits) > 1):
        return None
    start = _LENGTH_AT + len(digits) + 1
    end = start + int(digits)
    if message[end:] != _REQUEST_END:
        return None
    return bytes(message[_NONCE_AT:_RECIPIENT_AT]), message[start:end]


def encode_received(reference: bytes) -> bytes:
    """The response to the request with this nonce: it was received."""
    return b"%b%b%b%b%b" % (_RESPONSE_START, reference, _RESPONSE_MIDDLE, reference, _RESPONSE_END)


def decode_received(message: memoryview) -> bytes | None:
    """The nonce of the request to which a response refers; None if it is another message or encoded otherwise."""
    if (
        len(message) != _RESPONSE_SIZE
        or message[:_PROOF_AT] != _RESPONSE_START
        or message[_MIDDLE_AT:_REFERENCE_AT] != _RESPONSE_MIDDLE
    ):
        return None
    end = _REFERENCE_AT + ID_SIZE
    return bytes(message[_REFERENCE_AT:end]) if message[end:] == _RESPONSE_END else None
