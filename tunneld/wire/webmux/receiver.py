"""What the messages of the peer mean: each method takes one message, moves states and credit, answers, and returns what
the caller must know; those that may have more to tell yield it. Pure.

Blame: whatever the peer does wrong to one session resets that session (`Broken`). `RemoteProtocolError` ends the
connection and is kept for a peer that cannot be understood at all or that would make us hold without bound.
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
    opened,
)
from tunneld.wire.webmux.header import (
    FIRST_ATOM,
    MAX_FRAGMENT,
    MAX_OFFENCES,
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
    """The part of `Mux` between octets and events."""

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(initiator=initiator)
        self._peer_atoms: dict[int, str] = {}
        self._offences = 0

    def peer_atom(self, protocol: int) -> str | None:
        """What the peer means by the atom `protocol`; None when it has not said."""
        return self._peer_atoms.get(protocol)

    def _hear_syn(self, session: Session, protocol: int) -> Event | None:
        """SYN: the answer to ours, or a session of the peer's."""
        before = session.state
        if before.calling:
            self._lives.move(session, PEER_SYN)
            return ACCEPTED[session.sid]
        if before.over and session.opener is PEER:
            self._lives.begin(session, PEER_SYN, protocol)
            return opened(session.sid, protocol)
        if before.over:
            return self._hear_stray_syn(session)
        if before is WITHDRAWN:
            self._lives.move(session, PEER_SYN)
            self.outgoing += WORD.pack(session.sid << 24 | RST)
            return None
        return self._break(session, "SYN although it is open")

    def _hear_stray_syn(self, session: Session) -> Event:
        """SYN on an id that only we may open, or nobody. On one that was in use it may be an answer that comes too
        late (`ids`), so it is no offence.
        """
        if not session.life:
            self._offences += 1
            if self._offences > MAX_OFFENCES:
                raise RemoteProtocolError(f"SYN for session {session.sid}, which is not the peer's to open, once more")
        return self._break(session, "SYN although it is not the peer's to open")

    def _hear_fin(self, session: Session) -> Event | None:
        """FIN, of a session that does not wait for an answer."""
        before = session.state
        if before not in PEER_FIN:
            return self._break(session, f"FIN while {before.name}")
        self._lives.move(session, PEER_FIN)
        return None if before.silent else FINISHED[session.sid]

    def _hear_syn_and_fin(self, session: Session, protocol: int) -> Iterator[Event]:
        """Both at once: opened and closed (the draft leaves combinations open). FIN as the answer to our SYN is taken
        as if SYN came with it.
        """
        event = self._hear_syn(session, protocol)
        life = session.life
        if event:
            yield event
        if session.life == life and (event := self._hear_fin(session)):  # else it was opened again meanwhile
            yield event

    def _hear_rst(self, session: Session, payload: bytes) -> Event | None:
        """RST with anything is RST, and is never answered."""
        before = session.state
        self._lives.move(session, PEER_RST)
        if before.calling:
            return SessionRefused(session.sid, *reason_from_wire(payload))
        if before.silent:
            return None
        return Reset(session.sid, *reason_from_wire(payload))

    def _hear_data(self, session: Session, size: int) -> Broken | None:
        """The header of data with `size` octets of payload, which are delivered if the session is receiving then."""
        state = session.state
        if state.receiving:
            if size > session.allowance:
                return self._break(session, f"data of {size} octets exceeds its credit of {session.allowance}")
            session.allowance -= size
        elif session.unsettled and state.unanswered:
            return None  # of the life before, see `ids`
        elif session.opener and state not in PEER_DATA:  # reserved sessions are for proxies
            return self._break(session, f"data while {state.name}")
        return None

    def _hear_control(self, code: int, session: Session, value: int) -> Iterator[Event]:
        """A control message without payload."""
        match code:
            case Code.ADD_CREDIT:
                yield from self._hear_credit(session, credit_from_wire(value))
            case Code.SET_DEFAULT_CREDIT:
                yield DefaultCreditSet(credit_from_wire(value))
                for calling in self._lives.raise_credit(credit_from_wire(value)):
                    if calling.state.sending:
                        yield CreditAdded(calling.sid, self.credit(calling.sid))
            case Code.SET_MSS:
                self._fragment = min(value or MAX_FRAGMENT, MAX_FRAGMENT)
                yield MssSet(value)
            case Code.DEFINE_ENDPOINT:
                yield EndpointDefined(value, self.peer_atom(value))

    def _hear_credit(self, session: Session, octets: int) -> Iterator[Event]:
        if not session.opener or (session.state.over and session.life) or session.unsettled:
            return  # reserved, or late: see `session`
        session.credit += octets
        if session.state.sending:
            yield CreditAdded(session.sid, session.credit)

    def _hear_atom(self, index: int, payload: bytes) -> AtomInterned:
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"atom {index} is not UTF-8: octet {error.start} is wrong") from None
        self._peer_atoms[FIRST_ATOM + index] = text
        return AtomInterned(FIRST_ATOM + index, text)

    def _check_atom(self, index: int, size: int) -> None:
        if size > MAX_TEXT:
            raise RemoteProtocolError(f"atom {index} of {size} octets is longer than {MAX_TEXT}")

    def _break(self, session: Session, reason: str) -> Broken:
        """Reset a session for a fault of the peer."""
        self._lives.move(session, FAULT)
        self.outgoing += WORD.pack(session.sid << 24 | RST)
        return Broken(session.sid, reason)
