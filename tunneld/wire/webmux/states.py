"""The states of a WebMUX session, as a table. Everything about state is here; bytes and credit are elsewhere.

draft-gettys-webmux-00 describes them in prose only. A session has two directions; each is unopened, open or closed, and
a SYN must be answered with SYN (opens the other direction), FIN (accepted, the other direction is not used) or RST
(refused).

    opened by us:                                        opened by the peer:

     IDLE, RESET                                          IDLE, RESET
         | US SYN                                             | PEER SYN
         v                                                    v
     SYN_SENT ----- US FIN --> SYN_SENT_FIN               SYN_RCVD ----- PEER FIN --> SYN_RCVD_FIN
         | PEER SYN                | PEER SYN                 | US SYN                    | US SYN
         v                         v                          v                           v
       OPEN ------- US FIN --> LOCAL_CLOSED                 OPEN ------- PEER FIN --> REMOTE_CLOSED
         | PEER FIN                | PEER FIN                 | US FIN                    | US FIN
         v                         v                          v                           v
     REMOTE_CLOSED - US FIN -> IDLE                       LOCAL_CLOSED - PEER FIN --> IDLE

    FIN as the answer goes down two steps at once: SYN_SENT to REMOTE_CLOSED, SYN_RCVD to LOCAL_CLOSED, the others to
    IDLE. RST from the peer -> IDLE, RST from us -> RESET, from every state in which the session is alive; but RST from
    us while the peer's answer is outstanding -> WITHDRAWN, and from there PEER SYN -> RESET, PEER FIN -> IDLE.

RESET is IDLE with a memory. Nothing acknowledges a RST, so what the peer sent before it saw ours still arrives: data
and FIN are ignored; the peer's own RST ends the wait, and so does the next SYN.

WITHDRAWN is ours, not the draft's. A RST that chases its SYN may cross the peer's answer, with data behind it; if the
id were opened again, these would pass for the answer to the next SYN, and one session would receive the data of
another. The peer must answer a SYN, however, so we end our direction with FIN and send RST when the answer has arrived.

Two rules for reading the table. Which SYN is possible on an unused id depends on its parity and so on the TCP role,
which the table does not know: IDLE or RESET with US SYN is for our ids, with PEER SYN for the peer's. And a transition
that is not in the table is an error: ours is refused before anything is sent, the peer's is answered with RST (from US,
also where the table has none).

FIN and RST on an idle id are ignored, data is answered with RST; the draft is silent there.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final


class _FastHashEnum(Enum):
    """An enum that hashes as fast as any object; Python's own hashes the name, at every transition."""

    __hash__ = object.__hash__


class State(_FastHashEnum):
    """The state of a session id; in brackets what we may send / what the peer may send."""

    IDLE = auto()  # (SYN / SYN)
    SYN_SENT = auto()  # (data / its answer)
    SYN_SENT_FIN = auto()  # (nothing / its answer)
    SYN_RCVD = auto()  # (our answer / data)
    SYN_RCVD_FIN = auto()  # (our answer / nothing)
    WITHDRAWN = auto()  # (nothing / its answer)
    OPEN = auto()  # (data / data)
    LOCAL_CLOSED = auto()  # (nothing / data)
    REMOTE_CLOSED = auto()  # (data / nothing)
    RESET = auto()  # (SYN / late messages)

    # Membership in the sets below: checked for each fragment, and an attribute is the fastest way.
    over: bool
    ignored: bool
    opening: bool
    unanswered: bool
    incoming: bool
    sending: bool
    receiving: bool


class Party(_FastHashEnum):
    """The sender of a signal."""

    US = auto()
    PEER = auto()


class Signal(_FastHashEnum):
    """An input of the state machine. A fragment with several flags is several signals: SYN before data before FIN; RST
    alone.
    """

    SYN = auto()
    DATA = auto()
    FIN = auto()
    RST = auto()


WITHDRAWN, RESET, SYN_RCVD = State.WITHDRAWN, State.RESET, State.SYN_RCVD
US, PEER = Party.US, Party.PEER
"""Names for members used at every transition: looking one up in its enum costs nearly as much as a call."""

_SYN, _DATA, _FIN, _RST = Signal.SYN, Signal.DATA, Signal.FIN, Signal.RST

TABLE: dict[tuple[State, Party, Signal], State] = {
    (State.IDLE, US, _SYN): State.SYN_SENT,
    (State.IDLE, PEER, _SYN): State.SYN_RCVD,
    (State.IDLE, PEER, _FIN): State.IDLE,
    (State.IDLE, PEER, _RST): State.IDLE,
    #
    (State.SYN_SENT, US, _DATA): State.SYN_SENT,
    (State.SYN_SENT, US, _FIN): State.SYN_SENT_FIN,
    (State.SYN_SENT, US, _RST): State.WITHDRAWN,
    (State.SYN_SENT, PEER, _SYN): State.OPEN,
    (State.SYN_SENT, PEER, _FIN): State.REMOTE_CLOSED,
    (State.SYN_SENT, PEER, _RST): State.IDLE,
    #
    (State.SYN_SENT_FIN, US, _RST): State.WITHDRAWN,
    (State.SYN_SENT_FIN, PEER, _SYN): State.LOCAL_CLOSED,
    (State.SYN_SENT_FIN, PEER, _FIN): State.IDLE,
    (State.SYN_SENT_FIN, PEER, _RST): State.IDLE,
    #
    (State.WITHDRAWN, PEER, _SYN): State.RESET,
    (State.WITHDRAWN, PEER, _FIN): State.IDLE,
    (State.WITHDRAWN, PEER, _RST): State.IDLE,
    #
    (State.SYN_RCVD, US, _SYN): State.OPEN,
    (State.SYN_RCVD, US, _FIN): State.LOCAL_CLOSED,
    (State.SYN_RCVD, US, _RST): State.RESET,
    (State.SYN_RCVD, PEER, _DATA): State.SYN_RCVD,
    (State.SYN_RCVD, PEER, _FIN): State.SYN_RCVD_FIN,
    (State.SYN_RCVD, PEER, _RST): State.IDLE,
    #
    (State.SYN_RCVD_FIN, US, _SYN): State.REMOTE_CLOSED,
    (State.SYN_RCVD_FIN, US, _FIN): State.IDLE,
    (State.SYN_RCVD_FIN, US, _RST): State.RESET,
    (State.SYN_RCVD_FIN, PEER, _RST): State.IDLE,
    #
    (State.OPEN, US, _DATA): State.OPEN,
    (State.OPEN, US, _FIN): State.LOCAL_CLOSED,
    (State.OPEN, US, _RST): State.RESET,
    (State.OPEN, PEER, _DATA): State.OPEN,
    (State.OPEN, PEER, _FIN): State.REMOTE_CLOSED,
    (State.OPEN, PEER, _RST): State.IDLE,
    #
    (State.LOCAL_CLOSED, US, _RST): State.RESET,
    (State.LOCAL_CLOSED, PEER, _DATA): State.LOCAL_CLOSED,
    (State.LOCAL_CLOSED, PEER, _FIN): State.IDLE,
    (State.LOCAL_CLOSED, PEER, _RST): State.IDLE,
    #
    (State.REMOTE_CLOSED, US, _DATA): State.REMOTE_CLOSED,
    (State.REMOTE_CLOSED, US, _FIN): State.IDLE,
    (State.REMOTE_CLOSED, US, _RST): State.RESET,
    (State.REMOTE_CLOSED, PEER, _RST): State.IDLE,
    #
    (State.RESET, US, _SYN): State.SYN_SENT,
    (State.RESET, PEER, _SYN): State.SYN_RCVD,
    (State.RESET, PEER, _DATA): State.RESET,
    (State.RESET, PEER, _FIN): State.RESET,
    (State.RESET, PEER, _RST): State.IDLE,
}

OVER: Final = frozenset({State.IDLE, State.RESET})
"""The session is not alive (yet or any more): its id may be opened."""

IGNORED: Final = OVER | {State.WITHDRAWN}
"""The peer's messages for the session are not reported to the caller."""

OPENING: Final = frozenset({State.SYN_SENT, State.SYN_SENT_FIN})
"""We wait for the peer's answer."""

UNANSWERED: Final = OPENING | {State.WITHDRAWN}
"""The peer's answer is outstanding, whether we wait for it or not."""

INCOMING: Final = frozenset({State.SYN_RCVD, State.SYN_RCVD_FIN})
"""The peer waits for our answer."""


class Transition(dict[State, State]):
    """One signal of one party, as a column of the table: from each state in which it is allowed, the next state."""

    def __init__(self, party: Party, signal: Signal) -> None:
        super().__init__({before: after for (before, *key), after in TABLE.items() if key == [party, signal]})
        self.party = party
        self.signal = signal


OUR_SYN, OUR_DATA, OUR_FIN, OUR_RST = (Transition(Party.US, signal) for signal in Signal)
PEER_SYN, PEER_DATA, PEER_FIN, PEER_RST = (Transition(Party.PEER, signal) for signal in Signal)

FAULT: Final = Transition(Party.US, Signal.RST)
FAULT.update(dict.fromkeys(State, State.RESET))
"""Our RST in answer to a fault of the peer: possible in every state, also where the table has none."""

SENDING: Final = frozenset(OUR_DATA)
"""We may send data."""

RECEIVING: Final = frozenset(PEER_DATA) - OVER
"""Data of the peer is delivered. (In RESET it is ignored.)"""

for _state in State:
    _state.over = _state in OVER
    _state.ignored = _state in IGNORED
    _state.opening = _state in OPENING
    _state.unanswered = _state in UNANSWERED
    _state.incoming = _state in INCOMING
    _state.sending = _state in SENDING
    _state.receiving = _state in RECEIVING
