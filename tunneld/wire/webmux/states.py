"""The life of one WebMUX session id, as a table. Everything about state is here; nothing here knows octets or credit.

draft-gettys-webmux-00 describes it in prose only. A session has two directions; each is unopened, open or closed, and
a SYN must be answered by SYN (opens the other direction), FIN (accepted, the other is not used) or RST (refused).

    called by us:                                        called by the peer:

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
    IDLE. RST from the peer -> IDLE, RST from us -> RESET, from every state in which the session lives; but from us
    while the peer's answer is to come -> WITHDRAWN, and from there PEER SYN -> RESET, PEER FIN -> IDLE.

RESET is IDLE with a memory. Nothing acknowledges a RST, so what the peer sent before it saw ours still arrives: data
and FIN are swallowed, its own RST ends the wait, and so does the next SYN.

WITHDRAWN is ours, not the draft's. A RST that chases its SYN may find the peer's answer, and data behind it, already
on their way; if the id were opened again they would pass for the answer to the next SYN, and one caller would read
what was meant for another. The peer must answer a SYN, however, so we end our direction by FIN and say RST when the
answer has come.

Two rules read the table. Which SYN is possible on an unused id depends on parity and so on the TCP role, which the
table does not know: IDLE or RESET with US SYN is for our ids, with PEER SYN for theirs. And what is not in the table
is an error: ours is refused before anything was sent, the peer's is answered by RST (from US, also where the table has
none).

FIN and RST on an idle id are ignored, data is answered by RST; the draft is silent there.
"""

from __future__ import annotations

from enum import Enum, auto


class _Quick(Enum):
    """An enum that hashes as fast as any object; Python's own goes through the name, at every move."""

    __hash__ = object.__hash__


class State(_Quick):
    """Where a session id is in its life; in brackets what we may send / what the peer may send."""

    IDLE = auto()  # (SYN / SYN)
    SYN_SENT = auto()  # (data / its answer)
    SYN_SENT_FIN = auto()  # (nothing / its answer)
    SYN_RCVD = auto()  # (our answer / data)
    SYN_RCVD_FIN = auto()  # (our answer / nothing)
    WITHDRAWN = auto()  # (nothing / its answer)
    OPEN = auto()  # (data / data)
    LOCAL_CLOSED = auto()  # (nothing / data)
    REMOTE_CLOSED = auto()  # (data / nothing)
    RESET = auto()  # (SYN / whatever was on its way)

    # Which of the sets below it is in: asked for each fragment, and an attribute is the quickest answer.
    over: bool
    silent: bool
    calling: bool
    unanswered: bool
    called: bool
    sending: bool
    receiving: bool


class Who(_Quick):
    """Who said it."""

    US = auto()
    PEER = auto()


class Said(_Quick):
    """What was said. A fragment with several flags says several things: SYN before data before FIN; RST alone."""

    SYN = auto()
    DATA = auto()
    FIN = auto()
    RST = auto()


WITHDRAWN, RESET = State.WITHDRAWN, State.RESET
US, PEER = Who.US, Who.PEER
"""Those that are asked for at every move, by names of their own: a member of an enum costs nearly as much as a call."""

_SYN, _DATA, _FIN, _RST = Said.SYN, Said.DATA, Said.FIN, Said.RST

TABLE: dict[tuple[State, Who, Said], State] = {
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

OVER = frozenset({State.IDLE, State.RESET})
"""The session does not live (yet or any more): its id may be opened."""

SILENT = OVER | {State.WITHDRAWN}
"""Nothing that the peer says of it is told."""

CALLING = frozenset({State.SYN_SENT, State.SYN_SENT_FIN})
"""We wait for the peer's answer."""

UNANSWERED = CALLING | {State.WITHDRAWN}
"""The peer's answer is to come, whether we wait for it or not."""

CALLED = frozenset({State.SYN_RCVD, State.SYN_RCVD_FIN})
"""The peer waits for ours."""


class StateColumn(dict[State, State]):
    """What one end says, as a column of the table: from each state in which it may, the state that follows."""

    def __init__(self, who: Who, said: Said) -> None:
        super().__init__({before: after for (before, *saying), after in TABLE.items() if saying == [who, said]})
        self.who = who
        self.said = said


OUR_SYN, OUR_DATA, OUR_FIN, OUR_RST = (StateColumn(Who.US, said) for said in Said)
PEER_SYN, PEER_DATA, PEER_FIN, PEER_RST = (StateColumn(Who.PEER, said) for said in Said)

FAULT = StateColumn(Who.US, Said.RST)
FAULT.update(dict.fromkeys(State, State.RESET))
"""Our RST in answer to a fault of the peer: from every state, also where the table has none."""

SENDING = frozenset(OUR_DATA)
"""We may send data."""

RECEIVING = frozenset(PEER_DATA) - OVER
"""Data of the peer is delivered. (In RESET it is swallowed.)"""

for _state in State:
    _state.over = _state in OVER
    _state.silent = _state in SILENT
    _state.calling = _state in CALLING
    _state.unanswered = _state in UNANSWERED
    _state.called = _state in CALLED
    _state.sending = _state in SENDING
    _state.receiving = _state in RECEIVING
