"""Headers, constants and values of WebMUX messages (draft-gettys-webmux-00, "WebMUX Protocol Definition"). Pure.

Every fragment starts with a header of 4 or 8 octets:

     31      24 23 22 21 20 19 18 17                0
    +----------+--+--+--+--+--+--+-------------------+
    | session  | C| S| F| R| P| L| length or id      |   network order
    +----------+--+--+--+--+--+--+-------------------+
    |       32 bits in their place, only if L        |
    +------------------------------------------------+

    C 0   a data fragment with the flags SYN, FIN, RST, PUSH. After a SYN the field is the protocol id and no payload
          follows, otherwise it is the length of the payload, without header and padding.
    C 1   a control message: S F R P are its code.

The payload is padded with 0 to 3 octets of any value (we send zeros) so that every header is aligned. The draft prints
the mask of L as 0xFF040000; next to its own picture that can only be a misprint.

The constants are from the draft (ids, flags, the first credit) or ours: bounds of memory and work where the draft sets
none.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from tunneld.errors import LocalProtocolError

# From the draft

CONTROL: Final = 0x00800000
SYN: Final = 0x00400000
FIN: Final = 0x00200000
RST: Final = 0x00100000
PUSH: Final = 0x00080000
LONG: Final = 0x00040000
FIELD: Final = 0x0003FFFF
"""The 18 bits of length, protocol id or control value; also the largest value that needs no LONG."""

MAX_LONG: Final = 0xFFFFFFFF
"""The largest value of a header with LONG. The draft's structure has a signed integer, but no negative value makes
sense.
"""

RARE: Final = CONTROL | SYN | FIN | RST | LONG
"""A header without any of these flags is plain data, perhaps with PUSH."""

BARE: Final = RARE | PUSH | FIELD
"""A header whose only bit of these is FIN is a FIN without data."""

PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")
"""The padding after a payload, by the payload's length modulo 4."""


class Code(IntEnum):
    """Codes of control messages. 6 to 15 are undefined: their field is a payload length, and they are skipped."""

    INTERN_ATOM = 0
    DEFINE_ENDPOINT = 1
    SET_MSS = 2
    ADD_CREDIT = 3
    SET_DEFAULT_CREDIT = 4
    NO_OP = 5


WITHOUT_PAYLOAD: Final = frozenset({Code.DEFINE_ENDPOINT, Code.SET_MSS, Code.ADD_CREDIT, Code.SET_DEFAULT_CREDIT})
"""Control messages whose field is a value; no payload follows."""

WORD: Final = Struct("!I")
TWO_WORDS: Final = Struct("!II")


def pack_header(word: int, value: int) -> bytes:
    """Pack session and flags (`word`) and `value`, 0 to `MAX_LONG`, into a header of 4 octets if it fits, else 8."""
    if value <= FIELD:
        return WORD.pack(word | value)
    return TWO_WORDS.pack(word | LONG, value)


def pack_control(code: Code, session: int, value: int, payload: bytes = b"") -> bytes:
    """Pack a complete control message, with padding."""
    return pack_header(session << 24 | CONTROL | code << 19, value) + payload + PADDING[len(payload) & 3]


def code_of(word: int) -> int:
    """The code of a control message, 0 to 15."""
    return word >> 19 & 15


SESSION_IDS: Final = 256
FIRST_INITIATOR_ID: Final = 2
"""The initiator of the TCP connection opens 2, 4 ... 254. 0 and 1 are reserved."""
FIRST_ACCEPTOR_ID: Final = 3
"""The acceptor opens 3, 5 ... 255."""

FIRST_ATOM: Final = 0x20000
"""Protocol id of the atom with index 0. The text prints 0x2000, against its own range of 0x20000 to 0x200ff."""
ATOMS: Final = 256
MAX_PROTOCOL: Final = 0x3FFFF
"""TCP ports up to 0xffff, then UDP ports, atoms, and from 0x30000 ids that the server assigns."""

DEFAULT_CREDIT: Final = 16384
"""Bytes that may be sent on a session, in each direction, before any credit message."""

# Ours

UNLIMITED: Final = 1 << 63
"""Unlimited credit; on the wire it is 0. A stream of this length takes centuries, so it is added and used up like any
other credit, without a special case. There is no cap either: both ends add the same numbers in the same order.
"""

MAX_FRAGMENT: Final = 0x3FFFC
"""Most payload bytes that we put into one fragment: the largest size that needs neither LONG nor padding."""

MAX_FRAGMENTS: Final = 256
"""Fragments per `send`. A peer may ask for fragments of one byte (SetMSS 1), and a large `send` would then stop
everything else; this many take well under a millisecond.
"""

MAX_TEXT: Final = 1024
"""Bytes of an atom, or of the payload of a RST, that are kept. A server URI with its key has about 100. 256 atoms of
this size are 256 KiB per connection; a longer atom ends the connection, a longer reason is truncated.
"""

MAX_STRAY_SYNS: Final = 16
"""SYNs on ids that the peer may not open, each answered by RST, before the connection ends. No race causes one; a peer
with the wrong role sends only such SYNs, and these are enough to show in a packet trace.
"""

MAX_UNSENT: Final = 1 << 20
"""Bytes in `outgoing` beyond which nothing more is received: the peer sends, causes answers, and does not read. A
carrier pauses its sources at a quarter of this, so only answers can reach it; an honest peer causes a few thousandths
of the bytes that it sends.
"""


def credit_to_wire(size: int) -> int:
    """The field of AddCredit and SetDefaultCredit; 0 is unlimited. Raises `LocalProtocolError` for invalid credit."""
    if size == UNLIMITED:
        return 0
    if not 0 < size <= MAX_LONG:
        raise LocalProtocolError(f"credit of {size} bytes is out of range; use 1 to {MAX_LONG} or UNLIMITED")
    return size


def credit_from_wire(value: int) -> int:
    """The credit in bytes for the field of a message."""
    return value or UNLIMITED


def check_protocol(protocol: int) -> None:
    """Raise `LocalProtocolError` unless this is a protocol id."""
    if not 0 <= protocol <= MAX_PROTOCOL:
        raise LocalProtocolError(f"protocol id {protocol:#x} is out of range; the largest is {MAX_PROTOCOL:#x}")


def atom_to_wire(text: str) -> bytes:
    """The payload of InternAtom. Raises `LocalProtocolError` if it is longer than `MAX_TEXT` bytes."""
    payload = text.encode(errors="replace")
    if len(payload) > MAX_TEXT:
        raise LocalProtocolError(f"atom of {len(payload)} bytes is longer than {MAX_TEXT} bytes")
    return payload


def reason_to_wire(uri: str, text: str) -> bytes:
    """The payload of RST: URI, NUL, explanation, NUL; or empty if both are. Truncated to `MAX_TEXT` bytes; a NUL inside
    becomes a blank.
    """
    if not uri and not text:
        return b""
    payload = "\0".join(part.replace("\0", " ") for part in (uri, text)).encode(errors="replace")
    return payload[: MAX_TEXT - 1].decode(errors="ignore").encode() + b"\0"


def reason_from_wire(payload: bytes) -> tuple[str, str]:
    """URI and explanation in the payload of RST; either may be empty, invalid UTF-8 is replaced."""
    uri, _, rest = payload.decode(errors="replace").partition("\0")
    return uri, rest.partition("\0")[0]
