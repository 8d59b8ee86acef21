"""All session ids of one connection: which of them live, and every move from state to state. Pure.

No octets here: `sender` and `mux` say and hear them, and this keeps the books that both of them read.
"""

from __future__ import annotations

from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.ids import SessionIds
from tunneld.wire.webmux.limits import DEFAULT_CREDIT, FIRST_ACCEPTOR_ID, FIRST_INITIATOR_ID, SESSION_IDS
from tunneld.wire.webmux.session import Session
from tunneld.wire.webmux.states import CALLED, OVER, TABLE, UNANSWERED, Said, State, Who


class Lives:
    """The sessions of a connection and the credit that new ones start with."""

    def __init__(self, *, initiator: bool) -> None:
        first = FIRST_INITIATOR_ID if initiator else FIRST_ACCEPTOR_ID
        self.sessions = [Session(sid) for sid in range(SESSION_IDS)]
        self.ids = SessionIds(first)
        self.living = 0
        self.default_credit = DEFAULT_CREDIT  # octets, for what we send
        self.default_allowance = DEFAULT_CREDIT  # octets, for what the peer sends
        self._parity = first & 1

    def ours(self, session: Session) -> bool:
        """The id is ours to open, not the peer's."""
        return session.sid & 1 == self._parity and session.sid >= FIRST_INITIATOR_ID

    def open(self, protocol: int) -> Session:
        """Begin a life with our SYN. Raises `NoFreeSessionError`."""
        sid, settled = self.ids.take()
        session = self.sessions[sid]
        session.start(self.default_credit, self.default_allowance, protocol)
        session.unsettled = not settled
        self.move(session, Who.US, Said.SYN)
        return session

    def opened(self, session: Session, protocol: int) -> None:
        """Begin a life with the peer's SYN."""
        session.start(self.default_credit, self.default_allowance, protocol)
        self.move(session, Who.PEER, Said.SYN)

    def move(self, session: Session, who: Who, said: Said) -> None:
        """Move as the table says. Raises `LocalProtocolError` where it says nothing, and then changes nothing."""
        state = TABLE.get((session.state, who, said))
        if state is None:
            raise LocalProtocolError(f"session {session.sid} is {session.state.name}: no {said.name} from {who.name}")
        self._enter(session, state, who, said)

    def abandon(self, session: Session) -> None:
        """Our RST in answer to a fault of the peer, in whatever state it finds the session."""
        self._enter(session, State.RESET, Who.US, Said.RST)

    def raise_credit(self, octets: int) -> list[Session]:
        """The peer's SetDefaultCredit; returns the sessions it reaches although they are open (see `session`)."""
        more, self.default_credit = octets - self.default_credit, octets
        calling = [self.sessions[sid] for sid in self.ids.calling]
        for session in calling:
            session.add_credit(more)
        return calling

    def raise_allowance(self, octets: int) -> None:
        """Our SetDefaultCredit. Raises `LocalProtocolError` if it would fall."""
        more = octets - self.default_allowance
        if more < 0:
            raise LocalProtocolError(f"default credit cannot fall from {self.default_allowance} to {octets} octets")
        self.default_allowance = octets
        for session in self.sessions:
            if session.state in CALLED:
                session.add_allowance(more)

    def _enter(self, session: Session, state: State, who: Who, said: Said) -> None:
        before = session.state
        session.enter(state)
        if before in UNANSWERED and state not in UNANSWERED and who is Who.PEER:
            session.unsettled = False
            self.ids.answered(session.sid)
        if before in OVER and state not in OVER:
            self.living += 1
        elif before not in OVER and state in OVER:
            self.living -= 1
            session.end()
            self._free(session, said)
        elif who is Who.PEER and said is Said.RST:  # late
            self._free(session, said)

    def _free(self, session: Session, said: Said) -> None:
        if not self.ours(session):
            return
        if session.state is State.RESET:
            self.ids.reset(session.sid)
        elif said is Said.FIN:
            self.ids.finished(session.sid)
        else:
            self.ids.settled(session.sid)
