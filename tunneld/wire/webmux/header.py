"""The 4 or 8 octets in front of every WebMUX fragment (draft-gettys-webmux-00, "WebMUX Protocol Definition"). Pure.

     31      24 23 22 21 20 19 18 17                0
    +----------+--+--+--+--+--+--+-------------------+
    | session  | C| S| F| R| P| L| length or id      |   network order
    +----------+--+--+--+--+--+--+-------------------+
    |       32 bits in their place, only if L        |
    +------------------------------------------------+

    C 0   a data fragment: SYN, FIN, RST, PUSH as they say. Behind a SYN the field is the protocol id and no payload
          follows, otherwise it counts the octets of the payload, without header and padding.
    C 1   a control message: its code stands in S F R P.

The payload is padded with 0 to 3 octets of any value (we send zeros) so that every header is aligned. The draft prints
the mask of L as 0xFF040000; beside its own picture that can only be a misprint.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

# From the draft.

CONTROL = 0x00800000
SYN = 0x00400000
FIN = 0x00200000
RST = 0x00100000
PUSH = 0x00080000
LONG = 0x00040000
FIELD = 0x0003FFFF
"""The 18 bits of length, protocol id or control value; also the largest value that needs no LONG."""

MAX_LONG = 0xFFFFFFFF
"""The largest value of a header with LONG. The draft's structure has a signed integer there; nothing negative makes
sense.
"""

RARE = CONTROL | SYN | FIN | RST | LONG
"""A header without any of these is plain data, perhaps with PUSH."""

BARE = RARE | PUSH | FIELD
"""Of these a FIN that ends no data has nothing but itself."""

PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
"""What follows a payload, by its length modulo 4."""


class Code(IntEnum):
    """Control messages. 6 to 15 are undefined: their field is a payload length, and they are skipped."""

    INTERN_ATOM = 0
    DEFINE_ENDPOINT = 1
    SET_MSS = 2
    ADD_CREDIT = 3
    SET_DEFAULT_CREDIT = 4
    NO_OP = 5


WITHOUT_PAYLOAD = frozenset({Code.DEFINE_ENDPOINT, Code.SET_MSS, Code.ADD_CREDIT, Code.SET_DEFAULT_CREDIT})
"""Control messages whose field is a value; nothing follows them."""

WORD = Struct("!I")
TWO_WORDS = Struct("!II")


def pack_header(word: int, value: int) -> bytes:
    """The header made of session and flags (`word`) and `value`, 0 to `MAX_LONG`: 4 octets where it fits, else 8."""
    if value <= FIELD:
        return WORD.pack(word | value)
    return TWO_WORDS.pack(word | LONG, value)


def pack_control(code: Code, session: int, value: int, payload: bytes = b"") -> bytes:
    """A whole control message, padding included."""
    return pack_header(session << 24 | CONTROL | code << 19, value) + payload + PADDING[len(payload) & 3]


def code_of(word: int) -> int:
    """The code of a control message, 0 to 15."""
    return word >> 19 & 15
