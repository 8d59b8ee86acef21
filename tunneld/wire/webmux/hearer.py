"""What the messages of the peer mean: each method takes one message, moves states and credit, answers, and yields what
the caller must know. Pure.

Blame: whatever the peer does wrong to one session resets that session (`Broken`). `RemoteProtocolError` ends the
connection and is kept for a peer that cannot be understood at all or that would make us hold without bound.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from tunneld.errors import RemoteProtocolError
from tunneld.wire.webmux.events import (
    Accepted,
    AtomInterned,
    Broken,
    CreditAdded,
    DefaultCreditSet,
    EndpointDefined,
    Event,
    Finished,
    MssSet,
    Opened,
    Refused,
    Reset,
)
from tunneld.wire.webmux.header import FIN, RST, WORD, Code
from tunneld.wire.webmux.limits import FIRST_ATOM, FIRST_INITIATOR_ID, MAX_FRAGMENT, MAX_OFFENCES, MAX_TEXT
from tunneld.wire.webmux.sender import Sender
from tunneld.wire.webmux.session import Session
from tunneld.wire.webmux.states import CALLING, OVER, TABLE, UNANSWERED, Said, State, Who
from tunneld.wire.webmux.values import credit_from_wire, reason_from_wire


class Hearer(Sender):
    """The part of `Mux` between octets and events."""

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(initiator=initiator)
        self._peer_atoms: dict[int, str] = {}
        self._offences = 0

    def peer_atom(self, protocol: int) -> str | None:
        """What the peer means by the atom `protocol`; None when it has not said."""
        return self._peer_atoms.get(protocol)

    def _hear_syn(self, session: Session, protocol: int, flags: int) -> Iterator[Event]:
        """SYN, alone or with FIN (opened and closed at once; the draft leaves combinations open)."""
        if session.sid < FIRST_INITIATOR_ID or (session.state in OVER and self._lives.ours(session)):
            yield from self._hear_stray_syn(session)
            return
        if session.state in OVER:
            self._lives.opened(session, protocol)
            yield Opened(session.sid, protocol)
        elif session.state is State.WITHDRAWN:
            self._lives.move(session, Who.PEER, Said.SYN)
            self.outgoing += WORD.pack(session.sid << 24 | RST)
        elif session.state in CALLING:
            self._lives.move(session, Who.PEER, Said.SYN)
            yield Accepted(session.sid)
        else:
            yield self._break(session, "SYN although it is open")
        if flags & FIN and session.state not in OVER and session.state not in CALLING:  # else it was ended meanwhile
            yield from self._hear_fin(session)

    def _hear_stray_syn(self, session: Session) -> Iterator[Event]:
        """SYN on an id that only we may open, or nobody. On one that was in use it may be an answer that comes too
        late (`ids`), so it is no offence.
        """
        if not session.used:
            self._offences += 1
            if self._offences > MAX_OFFENCES:
                raise RemoteProtocolError(f"SYN for session {session.sid}, which is not the peer's to open, once more")
        yield self._break(session, "SYN although it is not the peer's to open")

    def _hear_fin(self, session: Session) -> Iterator[Event]:
        """FIN. As the answer to our SYN it is taken in two steps, as if SYN came with it."""
        if (session.state, Who.PEER, Said.FIN) not in TABLE:
            yield self._break(session, f"FIN while {session.state.name}")
            return
        if session.state in CALLING:
            self._lives.move(session, Who.PEER, Said.SYN)
            yield Accepted(session.sid)
        before = session.state
        if before in CALLING:  # ended meanwhile, and opened again
            return
        self._lives.move(session, Who.PEER, Said.FIN)
        if before not in OVER and before is not State.WITHDRAWN:
            yield Finished(session.sid)

    def _hear_rst(self, session: Session, payload: bytes) -> Iterator[Event]:
        """RST with anything is RST, and is never answered."""
        before = session.state
        self._lives.move(session, Who.PEER, Said.RST)
        if before in CALLING:
            yield Refused(session.sid, *reason_from_wire(payload))
        elif before not in OVER and before is not State.WITHDRAWN:
            yield Reset(session.sid, *reason_from_wire(payload))

    def _hear_data(self, session: Session, size: int) -> Generator[Event, None, bool]:
        """The header of data with `size` octets of payload; returns whether these are delivered."""
        if session.unsettled and session.state in UNANSWERED:
            return False  # of the life before, see `ids`
        if (session.state, Who.PEER, Said.DATA) not in TABLE:
            yield self._break(session, f"data while {session.state.name}")
        elif session.receiving and size > session.allowance:
            yield self._break(session, f"data of {size} octets exceeds its credit of {session.allowance}")
        elif session.receiving:
            session.allowance -= size
            return True
        return False

    def _hear_control(self, code: int, sid: int, value: int) -> Iterator[Event]:
        """A control message without payload."""
        match code:
            case Code.ADD_CREDIT:
                yield from self._hear_credit(self._sessions[sid], credit_from_wire(value))
            case Code.SET_DEFAULT_CREDIT:
                yield DefaultCreditSet(credit_from_wire(value))
                for session in self._lives.raise_credit(credit_from_wire(value)):
                    if session.sending:
                        yield CreditAdded(session.sid, self.credit(session.sid))
            case Code.SET_MSS:
                self._fragment = min(value or MAX_FRAGMENT, MAX_FRAGMENT)
                yield MssSet(value)
            case Code.DEFINE_ENDPOINT:
                yield EndpointDefined(value, self.peer_atom(value))

    def _hear_credit(self, session: Session, octets: int) -> Iterator[Event]:
        if session.sid < FIRST_INITIATOR_ID or (session.state in OVER and session.used) or session.unsettled:
            return  # reserved, or late: see `session`
        session.add_credit(octets)
        if session.sending:
            yield CreditAdded(session.sid, session.credit)

    def _hear_atom(self, index: int, payload: bytes) -> Iterator[Event]:
        try:
            text = payload.decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"atom {index} is not UTF-8: octet {error.start} is wrong") from None
        self._peer_atoms[FIRST_ATOM + index] = text
        yield AtomInterned(FIRST_ATOM + index, text)

    def _check_atom(self, index: int, size: int) -> None:
        if size > MAX_TEXT:
            raise RemoteProtocolError(f"atom {index} of {size} octets is longer than {MAX_TEXT}")

    def _break(self, session: Session, reason: str) -> Broken:
        """Reset a session for a fault of the peer."""
        self._lives.abandon(session)
        self.outgoing += WORD.pack(session.sid << 24 | RST)
        return Broken(session.sid, reason)
