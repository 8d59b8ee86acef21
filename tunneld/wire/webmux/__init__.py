"""WebMUX, many byte streams over one: draft-gettys-webmux-00 (J. Gettys, H. Frystyk Nielsen, 1998) as a pure codec.

A WebMUX *session* is one byte stream with two directions, on a TCP connection that carries many of them. (The rest of
this program calls a session a channel and the connection a carrier.) Nothing is negotiated: both ends know that they
speak WebMUX.

    header    the header in front of each fragment, and the values inside messages
    states    the states of a session, as a table
    sessions  all sessions of a connection: state, credit, and which id to open next
    sender    the messages we send
    receiver  the messages of the peer, and their effect
    events    the events that the caller gets
    mux       parses the input; `Mux` is the whole codec

    mux = Mux(initiator=True)
    session = mux.open(80)
    mux.send(session, b"hello")
    ... write mux.outgoing to the connection, read data from it
    for item in mux.receive(data):
        ...

Where the draft is silent, contradicts itself or cannot work, the modules document our decision. All of them:

- Credit messages cross on the wire, and late credit must not count twice (`sessions`). Ids are reused in an order that
  keeps late messages of one generation out of the next (`sessions`), and a session that the peer has not answered is
  reset only after its answer (`states`).
- The answer to a SYN repeats the protocol id. SYN with LONG has the id in the long word. FIN with SYN opens and closes
  at once, RST with anything is RST, SYN on an open session is a fault.
- A fault resets its session: data without or beyond credit, before the answer, after FIN or on an idle id. SYNs of
  wrong parity or on a reserved id are answered by RST, `MAX_STRAY_SYNS` times.
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
