"""The modern envelope: how two nodes with Ed25519 keys wrap the messages between them. Pure; TLS is in `tunneld.egtp`.

    hello    00000300  fstring20(recipient) fstring20(session) string(certificate)
    data     00000301  fstring20(session) hyper(number) string(TLS records)
    reject   00000302  fstring20(session) fstring20(node) string(reason)
    streams  00000303  hyper(number) frames              only inside a session, see `streams`

XDR as in the classic envelope, whose types are 0, 1 and 0x202: big endian, `fstringN` is N octets, `string` a length of
4 octets and the octets, both padded with zeros to a multiple of 4; `hyper` is a number of 8 octets (RFC 4506). The
frames of a streams envelope extend to its end, without length and padding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from tunneld.errors import RemoteProtocolError

HELLO, RECORDS, REJECT, STREAMS = 0x300, 0x301, 0x302, 0x303
ID_SIZE = 20
MAX_REASON = 256
_TYPE = struct.Struct(">I")
_HELLO = struct.Struct(">I20s20sI")
_RECORDS = struct.Struct(">I20sQI")
_REJECT = struct.Struct(">I20s20sI")
_STREAMS = struct.Struct(">IQ")
_PADDING = tuple(bytes(size) for size in range(4))
STREAMS_HEADER = _STREAMS.size


@dataclass(frozen=True, slots=True)
class HelloEnvelope:
    """The first envelope of each direction: who is to read it, and whose certificate the session is to have."""

    recipient: bytes
    session: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class RecordsEnvelope:
    """TLS records of a session: those of the handshake, or of one message."""

    session: bytes
    number: int
    records: bytes | memoryview  # a view; mypyc cannot name that type alone in a dataclass


@dataclass(frozen=True, slots=True)
class RejectEnvelope:
    """The peer does not know the session, or ended it. It is not authenticated."""

    session: bytes
    node: bytes
    reason: str


ModernEnvelope = HelloEnvelope | RecordsEnvelope | RejectEnvelope


def type_of(envelope: bytes | memoryview) -> int:
    """The XDR type number. Raises `RemoteProtocolError`."""
    if len(envelope) < 4:
        raise RemoteProtocolError("an envelope without a type")
    return int(_TYPE.unpack_from(envelope)[0])


def encode_hello(recipient: bytes, session: bytes, certificate: bytes) -> bytes:
    """The envelope that begins a session."""
    return _HELLO.pack(HELLO, recipient, session, len(certificate)) + certificate + bytes(-len(certificate) & 3)


def records_parts(session: bytes, number: int, records: bytes) -> tuple[bytes, bytes, bytes]:
    """The parts of an envelope with TLS records of a session, for a caller that copies them once."""
    size = len(records)
    return _RECORDS.pack(RECORDS, session, number, size), records, _PADDING[-size & 3]


def encode_records(session: bytes, number: int, records: bytes) -> bytes:
    """TLS records of a session."""
    return b"".join(records_parts(session, number, records))


def encode_reject(session: bytes, node: bytes, reason: str) -> bytes:
    """The refusal of a session."""
    text = reason.encode()[:MAX_REASON]
    return _REJECT.pack(REJECT, session, node, len(text)) + text + bytes(-len(text) & 3)


def encode_streams(number: int, frames: bytes | bytearray) -> bytes:
    """A numbered message of streams."""
    return _STREAMS.pack(STREAMS, number) + frames


def decode_envelope(envelope: memoryview) -> ModernEnvelope:
    """Decode any envelope between two nodes. Raises `RemoteProtocolError`."""
    kind = type_of(envelope)
    if kind == RECORDS:
        _, session, number, size = _unpack(_RECORDS, envelope)
        return RecordsEnvelope(session, number, _string(envelope, _RECORDS.size, size))
    if kind == HELLO:
        _, recipient, session, size = _unpack(_HELLO, envelope)
        return HelloEnvelope(recipient, session, bytes(_string(envelope, _HELLO.size, size)))
    if kind == REJECT:
        _, session, node, size = _unpack(_REJECT, envelope)
        return RejectEnvelope(session, node, bytes(_string(envelope, _REJECT.size, size)).decode(errors="replace"))
    raise RemoteProtocolError(f"unrecognized envelope {kind:#x}")


def decode_streams(envelope: memoryview) -> tuple[int, memoryview]:
    """The number and the frames of a message of streams. Raises `RemoteProtocolError`."""
    if type_of(envelope) != STREAMS:
        raise RemoteProtocolError(f"envelope {type_of(envelope):#x} in a session")
    _, number = _unpack(_STREAMS, envelope)
    return number, envelope[STREAMS_HEADER:]


def _unpack(form: struct.Struct, envelope: memoryview) -> tuple[Any, ...]:
    if len(envelope) < form.size:
        raise RemoteProtocolError("an envelope was cut")
    return form.unpack_from(envelope)


def _string(envelope: memoryview, at: int, size: int) -> memoryview:
    """The last member of an envelope: nothing follows its padding, which is zero."""
    end = at + size
    if len(envelope) != end + (-size & 3) or any(envelope[end:]):
        raise RemoteProtocolError("an envelope has a wrong length")
    return envelope[at:end]
