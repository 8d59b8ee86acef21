"""WebMUX, many byte streams over one: draft-gettys-webmux-00 (J. Gettys, H. Frystyk Nielsen, 1998) as a pure codec.

A WebMUX *session* is one byte stream with two directions; what carries them is the connection. (The rest of this
program calls the one a channel and the other a carrier.) Nothing is negotiated: both ends know that they speak it.

    header    the octets in front of each fragment           values    what stands inside messages
    states    the life of a session, as a table              session   one id: its state and its credit
    ids       which id to open next                          lives     all of a connection
    sender    what we say                                    hearer    what the peer says, and what it means
    events    what the caller is told                        mux       the reading of octets; `Mux` is all of it

    mux = Mux(initiator=True)
    session = mux.open(80)
    mux.send(session, b"hello")
    ... write mux.outgoing to the connection, read data from it
    for item in mux.receive(data):
        ...

Where the draft is silent, contradicts itself or cannot work, the rooms say what we do; the decisions in one place:

- Credit crosses on the wire, and late credit must not count twice (`session`). Ids are reused in an order that keeps
  late words of one life out of the next (`ids`), and a session is reset only after the peer has answered (`states`).
- A SYN answer repeats the protocol id. SYN with LONG carries the id in the long word. FIN with SYN opens and closes at
  once, RST with anything is RST, SYN on an open session is a fault.
- Faults cost their session: data without or beyond credit, before the answer, after FIN or on an idle id. SYNs of
  wrong parity or on a reserved id are answered by RST `MAX_OFFENCES` times.
- Reserved sessions 0 and 1, NoOp and undefined control messages are skipped, however long.
"""

from tunneld.wire.webmux.events import (
    Accepted,
    AtomInterned,
    Broken,
    CreditAdded,
    Data,
    DefaultCreditSet,
    EndpointDefined,
    Event,
    Finished,
    Item,
    MssSet,
    Opened,
    Reset,
    SessionRefused,
)
from tunneld.wire.webmux.header import DEFAULT_CREDIT, UNLIMITED
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.sessions import NoFreeSessionError

__all__ = [
    "DEFAULT_CREDIT",
    "UNLIMITED",
    "Accepted",
    "AtomInterned",
    "Broken",
    "CreditAdded",
    "Data",
    "DefaultCreditSet",
    "EndpointDefined",
    "Event",
    "Finished",
    "Item",
    "MssSet",
    "Mux",
    "NoFreeSessionError",
    "Opened",
    "Reset",
    "SessionRefused",
]
