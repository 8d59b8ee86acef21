"""All session ids of one connection: which of them live, and every move from state to state. Pure.

No octets here: `sender` and `mux` say and hear them, and this keeps the books that both of them read.
"""

from __future__ import annotations

from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.ids import SessionIds
from tunneld.wire.webmux.limits import DEFAULT_CREDIT, FIRST_ACCEPTOR_ID, FIRST_INITIATOR_ID, SESSION_IDS
from tunneld.wire.webmux.session import Session
from tunneld.wire.webmux.states import FAULT, OUR_SYN, PEER, PEER_RST, RESET, US, State, StateColumn, Who


class SessionTable:
    """The sessions of a connection and the credit that new ones start with."""

    def __init__(self, *, initiator: bool) -> None:
        first = FIRST_INITIATOR_ID if initiator else FIRST_ACCEPTOR_ID
        reserved: list[Who | None] = [None] * FIRST_INITIATOR_ID
        by_parity = [US, PEER] if initiator else [PEER, US]
        openers = reserved + by_parity * ((SESSION_IDS - FIRST_INITIATOR_ID) // 2)
        self.sessions = [Session(sid, opener) for sid, opener in enumerate(openers)]
        self.ids = SessionIds(first)
        self.default_credit = DEFAULT_CREDIT  # octets, for what we send
        self.default_allowance = DEFAULT_CREDIT  # octets, for what the peer sends

    @property
    def living(self) -> int:
        """How many of them live."""
        return sum(not session.state.over for session in self.sessions)

    def open(self, protocol: int) -> Session:
        """Begin a life with our SYN. Raises `NoFreeSessionError`."""
        sid, settled = self.ids.take()
        session = self.sessions[sid]
        session.unsettled = not settled
        self.begin(session, OUR_SYN, protocol)
        return session

    def begin(self, session: Session, syn: StateColumn, protocol: int) -> None:
        """Begin a life with our SYN or the peer's."""
        session.state = syn[session.state]
        session.life += 1
        session.protocol = protocol
        session.credit += self.default_credit
        session.allowance += self.default_allowance

    def move(self, session: Session, saying: StateColumn) -> None:
        """Move as the table says, in a life or after one.

        Raises `LocalProtocolError` where it says nothing, and then changes nothing.
        """
        before = session.state
        after = saying.get(before)
        if after is None:
            who, said = saying.who.name, saying.said.name
            raise LocalProtocolError(f"session {session.sid} is {before.name}: no {said} from {who}")
        session.state = after
        if before.unanswered and not after.unanswered and saying is not FAULT:
            session.unsettled = False
            self.ids.answered(session.sid)
        if after.over and not before.over:
            session.credit = session.allowance = session.held = 0
            if session.opener is US:
                self._free(session.sid, saying, after)
        elif saying is PEER_RST and session.opener is US:  # late
            self.ids.settled(session.sid)

    def raise_credit(self, octets: int) -> list[Session]:
        """The peer's SetDefaultCredit; returns the sessions it reaches although they are open (see `session`)."""
        more, self.default_credit = octets - self.default_credit, octets
        calling = [self.sessions[sid] for sid in self.ids.calling]
        for session in calling:
            session.credit += more
        return calling

    def raise_allowance(self, octets: int) -> None:
        """Our SetDefaultCredit. Raises `LocalProtocolError` if it would fall."""
        more = octets - self.default_allowance
        if more < 0:
            raise LocalProtocolError(f"default credit cannot fall from {self.default_allowance} to {octets} octets")
        self.default_allowance = octets
        for session in self.sessions:
            if session.state.called:
                session.allowance += more

    def _free(self, sid: int, saying: StateColumn, after: State) -> None:
        """An id of ours waits for its next life."""
        if saying is PEER_RST:
            self.ids.settled(sid)
        elif after is RESET:
            self.ids.reset(sid)
        else:
            self.ids.finished(sid)
