"""The messages of the peer: each method handles one message. It moves states and credit, answers, and returns the event
that the caller must know of; methods that may have several events yield them. Pure.

Errors: whatever the peer does wrong to one session resets that session (`Broken`). `RemoteProtocolError` ends the
connection; it is for input that cannot be parsed or that would make us buffer without bound.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunneld.errors import RemoteProtocolError
from tunneld.wire.webmux.events import (
    ACCEPTED,
    FINISHED,
    AtomInterned,
    Broken,
    CreditAdded,
    DefaultCreditSet,
    EndpointDefined,
    Event,
    MssSet,
    Reset,
    SessionRefused,
    opened_event,
)
from tunneld.wire.webmux.header import (
    FIRST_ATOM,
    MAX_FRAGMENT,
    MAX_STRAY_SYNS,
    MAX_TEXT,
    RST,
    WORD,
    Code,
    credit_from_wire,
    reason_from_wire,
)
from tunneld.wire.webmux.sender import Sender
from tunneld.wire.webmux.sessions import Session
from tunneld.wire.webmux.states import FAULT, PEER, PEER_DATA, PEER_FIN, PEER_RST, PEER_SYN, WITHDRAWN


class Receiver(Sender):
    """The receiving half of `Mux`, behind the parser."""

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(initiator=initiator)
        self._stray_syns = 0
        self.cost = 0  # of the last `receive`: fragments parsed and sessions touched

    def peer_atom(self, protocol: int) -> str | None:
        """The text that the peer interned for the atom `protocol`; None if it has not."""
        return self._peer_atoms.get(protocol)

    def _receive_syn(self, session: Session, protocol: int) -> Event | None:
        """SYN: the answer to ours, or a new session of the peer."""
        before = session.state
        if before.opening:
            self.table.move(session, PEER_SYN)
            return ACCEPTED[session.sid]
        if before.over and session.opener is PEER:
            self.table.begin(session, PEER_SYN, protocol)
            return opened_event(session.sid, protocol)
        if before.over:
            return self._receive_stray_syn(session)
        if before is WITHDRAWN:
            self.table.move(session, PEER_SYN)
            self.outgoing += WORD.pack(session.sid << 24 | RST)
            return None
        return self._break(session, "SYN on an open session")

    def _receive_stray_syn(self, session: Session) -> Event:
        """SYN on an id that the peer may not open. On an id that was in use it may be a late answer (`sessions`), so it
        does not count.
        """
        if not session.generation:
            self._stray_syns += 1
            if self._stray_syns > MAX_STRAY_SYNS:
                raise RemoteProtocolError(f"too many SYNs on ids that the peer may not open, such as {session.sid}")
        return self._break(session, "SYN on an id that the peer may not open")

    def _receive_fin(self, session: Session) -> Event | None:
        """FIN on a session for which no answer is outstanding."""
        before = session.state
        if before not in PEER_FIN:
            return self._break(session, f"FIN in state {before.name}")
        self.table.move(session, PEER_FIN)
        return None if before.ignored else FINISHED[session.sid]

    def _receive_syn_and_fin(self, session: Session, protocol: int) -> Iterator[Event]:
        """SYN and FIN in one header: opened and closed (the draft does not define combinations). FIN as the answer to
        our SYN is handled as if it came with a SYN.
        """
        event = self._receive_syn(session, protocol)
        generation = session.generation
        if event:
            yield event
        if session.generation == generation and (event := self._receive_fin(session)):  # else the caller reopened it
            yield event

    def _receive_rst(self, session: Session, payload: bytes) -> Event | None:
        """RST, whatever other flags it has. It is never answered."""
        before = session.state
        self.table.move(session, PEER_RST)
        if before.opening:
            return SessionRefused(session.sid, *reason_from_wire(payload))
        if before.ignored:
            return None
        return Reset(session.sid, *reason_from_wire(payload))

    def _receive_data(self, session: Session, size: int) -> Broken | None:
        """Check the header of `size` bytes of data. The payload is delivered if the session can receive after this."""
        state = session.state
        if state.receiving:
            if size > session.allowance:
                return self._break(session, f"data of {size} bytes exceeds its credit of {session.allowance}")
            session.allowance -= size
        elif session.unsettled and state.unanswered:
            return None  # late, of the previous generation: see `sessions`
        elif session.opener and state not in PEER_DATA:  # reserved sessions are for proxies
            return self._break(session, f"data in state {state.name}")
        return None

    def _receive_control(self, code: int, session: Session, value: int) -> Iterator[Event]:
        """A control message without payload."""
        match code:
            case Code.ADD_CREDIT:
                yield from self._receive_credit(session, credit_from_wire(value))
            case Code.SET_DEFAULT_CREDIT:
                self.table.raise_credit(credit_from_wire(value))
                yield DefaultCreditSet(credit_from_wire(value))
            case Code.SET_MSS:
                self._max_fragment = min(value or MAX_FRAGMENT, MAX_FRAGMENT)
                yield MssSet(value)
            case Code.DEFINE_ENDPOINT:
                yield EndpointDefined(value, self.peer_atom(value))

    def _apply_default_credit(self) -> Iterator[Event]:
        """The end of some input: what SetDefaultCredit in it means for sessions that are open already."""
        for session in self.table.apply_default_credit():
            self.cost += 1
            if session.state.sending:
                yield CreditAdded(session.sid, self.credit(session.sid))

    def _receive_credit(self, session: Session, size: int) -> Iterator[Event]:
        if not session.opener or (session.state.over and session.generation) or session.unsettled:
            return  # reserved, or late: see `sessions`
        session.credit += size
        if session.state.sending:
            yield CreditAdded(session.sid, session.credit)

    def _receive_atom(self, index: int, payload: bytes) -> AtomInterned:
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"atom {index} is not UTF-8: byte {error.start} is invalid") from None
        self._peer_atoms[FIRST_ATOM + index] = text
        return AtomInterned(FIRST_ATOM + index, text)

    def _check_atom(self, index: int, size: int) -> None:
        if size > MAX_TEXT:
            raise RemoteProtocolError(f"atom {index} of {size} bytes is longer than {MAX_TEXT} bytes")

    def _break(self, session: Session, reason: str) -> Broken:
        """Reset a session because of a fault of the peer."""
        self.table.move(session, FAULT)
        self.outgoing += WORD.pack(session.sid << 24 | RST)
        return Broken(session.sid, reason)
