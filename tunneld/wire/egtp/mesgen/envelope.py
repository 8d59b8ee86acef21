"""The three kinds of classic envelopes as bytes, and how a session's key seals a message. Pure.

    header message   0      string(header), iv, string(ct)      until the first message of the other kind comes back
    short message    1      session id, iv, string(ct)
    reject           0x202  session id, id of the node that rejects it: that session is unknown. Nothing proves it.

    ct = E(key, iv, string(message), mac)    mac = H(key, message)

The encoding is XDR: numbers of four octets, most significant first; a string is its length, its octets, and zeros up to
a multiple of four.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from struct import Struct
from typing import TypeAlias

from tunneld.errors import RemoteProtocolError
from tunneld.wire.egtp.frames import MAX_MESSAGE
from tunneld.wire.egtp.ids import ID_OCTETS
from tunneld.wire.egtp.mesgen.ciphers import BLOCK_OCTETS, HASH_OCTETS, desx_decrypting, desx_encrypting, keyed_hash
from tunneld.wire.egtp.steps import Steps, finish

_WORD = Struct("!I")

HEADER_MESSAGE = 0
SHORT_MESSAGE = 1
REJECT = 0x202


class EnvelopeError(RemoteProtocolError):
    """An envelope that this node cannot open: malformed, forged, or for another node."""


def pack_string(octets: bytes) -> bytes:
    """A string of XDR."""
    return _WORD.pack(len(octets)) + octets + bytes(-len(octets) % 4)


class XdrReader:
    """Takes values off the front of some XDR. Raises `EnvelopeError` where they are not complete or not canonical."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def word(self) -> int:
        """A number of four octets."""
        return int(_WORD.unpack(self.fixed(_WORD.size))[0])

    def fixed(self, length: int) -> bytes:
        """Octets of a known length, a multiple of four."""
        end = self._at + length
        if end > len(self._data):
            raise EnvelopeError(f"EGTP envelope ends after {len(self._data)} bytes, inside a value")
        octets, self._at = self._data[self._at : end], end
        return octets

    def string(self, longest: int) -> bytes:
        """A string of at most `longest` octets."""
        length = self.word()
        if length > longest:
            raise EnvelopeError(f"EGTP envelope has a string of {length} bytes where {longest} are the most")
        octets = self.fixed(length)
        if any(self.fixed(-length % 4)):
            raise EnvelopeError("EGTP envelope has a string whose padding is not zero")
        return octets

    def before(self) -> bytes:
        """All octets that were taken so far."""
        return self._data[: self._at]

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise EnvelopeError(f"EGTP envelope has {len(self._data) - self._at} bytes after its end")


@dataclass(frozen=True, slots=True)
class HeaderMessage:
    """A message with the header of its session."""

    header: bytes
    iv: bytes
    ciphertext: bytes

    def encode(self) -> bytes:
        """The envelope."""
        return _WORD.pack(HEADER_MESSAGE) + pack_string(self.header) + self.iv + pack_string(self.ciphertext)


@dataclass(frozen=True, slots=True)
class ShortMessage:
    """A message of a session that both ends know."""

    session_id: bytes
    iv: bytes
    ciphertext: bytes

    def encode(self) -> bytes:
        """The envelope."""
        return _WORD.pack(SHORT_MESSAGE) + self.session_id + self.iv + pack_string(self.ciphertext)


@dataclass(frozen=True, slots=True)
class RejectMessage:
    """The node `node_id` claims that it does not know the session."""

    session_id: bytes
    node_id: bytes

    def encode(self) -> bytes:
        """The envelope."""
        return _WORD.pack(REJECT) + self.session_id + self.node_id


AnyEnvelope: TypeAlias = HeaderMessage | ShortMessage | RejectMessage


def parse_envelope(data: bytes) -> AnyEnvelope:
    """Parse an envelope, without opening it. Raises `EnvelopeError`."""
    reader = XdrReader(data)
    kind = reader.word()
    envelope: AnyEnvelope
    if kind == HEADER_MESSAGE:
        envelope = HeaderMessage(reader.string(MAX_MESSAGE), reader.fixed(BLOCK_OCTETS), reader.string(MAX_MESSAGE))
    elif kind == SHORT_MESSAGE:
        envelope = ShortMessage(reader.fixed(ID_OCTETS), reader.fixed(BLOCK_OCTETS), reader.string(MAX_MESSAGE))
    elif kind == REJECT:
        envelope = RejectMessage(reader.fixed(ID_OCTETS), reader.fixed(ID_OCTETS))
    else:
        raise EnvelopeError(f"EGTP envelope has the unknown type {kind:#x}")
    reader.end()
    return envelope


def seal_message(key: bytes, iv: bytes, message: bytes) -> bytes:
    """Encrypt a message and its MAC."""
    return finish(sealing_message(key, iv, message))


def sealing_message(key: bytes, iv: bytes, message: bytes) -> Steps[bytes]:
    """`seal_message` in steps."""
    return (yield from desx_encrypting(key, iv, pack_string(message) + keyed_hash(key, message)))


def open_message(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """The message of a ciphertext. Raises `EnvelopeError` if it was not sealed with this key and iv."""
    return finish(opening_message(key, iv, ciphertext))


def opening_message(key: bytes, iv: bytes, ciphertext: bytes) -> Steps[bytes]:
    """`open_message` in steps."""
    try:
        reader = XdrReader((yield from desx_decrypting(key, iv, ciphertext)))
        message, mac = reader.string(MAX_MESSAGE), reader.fixed(HASH_OCTETS)
        reader.end()
    except RemoteProtocolError:
        raise EnvelopeError("EGTP envelope was altered, or is not of this session") from None
    if not hmac.compare_digest(mac, keyed_hash(key, message)):
        raise EnvelopeError("EGTP envelope was altered, or is not of this session")
    return message
