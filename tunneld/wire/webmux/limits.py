"""Every number of the WebMUX codec that is not the shape of a header.

From the draft (draft-gettys-webmux-00): session ids, protocol ids and the first credit. Ours: what bounds memory and
work where the draft sets no bound.
"""

from __future__ import annotations

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
