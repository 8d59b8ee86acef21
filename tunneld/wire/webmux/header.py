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

Every number of the WebMUX codec that is not the shape of a header.

From the draft (draft-gettys-webmux-00): session ids, protocol ids and the first credit. Ours: what bounds memory and
work where the draft sets no bound.

What stands inside WebMUX messages: texts, amounts of credit, protocol ids. Pure.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from tunneld.errors import LocalProtocolError

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


# From the draft.

SESSION_IDS = 256
FIRST_INITIATOR_ID = 2
"""Whoever made the TCP connection opens 2, 4 ... 254. 0 and 1 are reserved."""
FIRST_ACCEPTOR_ID = 3
"""Whoever accepted it opens 3, 5 ... 255."""

FIRST_ATOM = 0x20000
"""Protocol id of the atom with index 0. The text prints 0x2000, against its own range of 0x20000 to 0x200ff."""
ATOMS = 256
MAX_PROTOCOL = 0x3FFFF
"""Up to 0xffff TCP ports, then UDP ports, atoms, and from 0x30000 on whatever the server assigns."""

DEFAULT_CREDIT = 16384
"""Octets that may be sent on a session, in each direction, before anything else was said."""

# Ours.

UNLIMITED = 1 << 63
"""Credit that never ends; on the wire it is 0. A stream of this length takes centuries, so it is added and used up like
any other credit and needs no case of its own. There is no cap either: both ends add the same numbers in the same order.
"""

MAX_FRAGMENT = 0x3FFFC
"""Octets of payload we put into one fragment: the most that needs neither LONG nor padding."""

MAX_FRAGMENTS = 256
"""Fragments made by one `send`. A peer may ask for fragments of one octet (SetMSS 1), and then a large `send` would
stop everything else; this many take well under a millisecond.
"""

MAX_TEXT = 1024
"""Octets of an atom or of the payload of a RST that are kept. A server URI with its key takes about 100. Kept for
each of 256 atoms that makes 256 KiB for a connection; longer atoms end it, longer reasons are cut.
"""

MAX_OFFENCES = 16
"""SYNs on ids that are not the peer's to open, each answered by RST, before the connection ends. No race makes one; a
peer that has the roles mixed up makes every SYN wrong, and this is enough of them to be seen in a trace.
"""

MAX_UNSENT = 1 << 20
"""Octets in `outgoing` beyond which nothing more is received: the peer sends, makes us answer, and does not read. A
carrier pauses its sources at a quarter of this, so that only answers can reach it, of which an honest peer makes a few
thousandths of what it sends.
"""


def credit_to_wire(octets: int) -> int:
    """The field of AddCredit and SetDefaultCredit: 0 is unlimited. Raises `LocalProtocolError` for other oddities."""
    if octets == UNLIMITED:
        return 0
    if not 0 < octets <= MAX_LONG:
        raise LocalProtocolError(f"credit of {octets} octets cannot be said; give 1 to {MAX_LONG} or UNLIMITED")
    return octets


def credit_from_wire(value: int) -> int:
    """Octets of credit that the field means."""
    return value or UNLIMITED


def check_protocol(protocol: int) -> None:
    """Raises `LocalProtocolError` for what is no protocol id."""
    if not 0 <= protocol <= MAX_PROTOCOL:
        raise LocalProtocolError(f"protocol id {protocol:#x} is beyond {MAX_PROTOCOL:#x}")


def atom_to_wire(text: str) -> bytes:
    """The payload of InternAtom. Raises `LocalProtocolError` when it would be longer than `MAX_TEXT` octets."""
    payload = text.encode(errors="replace")
    if len(payload) > MAX_TEXT:
        raise LocalProtocolError(f"atom of {len(payload)} octets is longer than {MAX_TEXT}")
    return payload


def reason_to_wire(uri: str, text: str) -> bytes:
    """The payload of RST: URI, NUL, explanation, NUL, or nothing at all. Cut to `MAX_TEXT` octets; a NUL inside becomes
    a blank.
    """
    if not uri and not text:
        return b""
    payload = "\0".join(part.replace("\0", " ") for part in (uri, text)).encode(errors="replace")
    return payload[: MAX_TEXT - 1].decode(errors="ignore").encode() + b"\0"


def reason_from_wire(payload: bytes) -> tuple[str, str]:
    """URI and explanation in the payload of RST, as far as they are there and UTF-8."""
    uri, _, rest = payload.decode(errors="replace").partition("\0")
    return uri, rest.partition("\0")[0]
