"""Everything that a WebMUX endpoint says: each method appends whole messages to `outgoing`. Pure.

Actions are checked against the state table before anything is written, so a refused one (`LocalProtocolError`, a bug
of the caller) changes nothing.
"""

from __future__ import annotations

from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.header import (
    ATOMS,
    FIELD,
    FIN,
    FIRST_ATOM,
    MAX_FRAGMENT,
    MAX_FRAGMENTS,
    MAX_LONG,
    PADDING,
    PUSH,
    RST,
    SYN,
    UNLIMITED,
    WORD,
    Code,
    atom_to_wire,
    check_protocol,
    credit_to_wire,
    pack_control,
    reason_to_wire,
)
from tunneld.wire.webmux.sessions import Session, SessionTable
from tunneld.wire.webmux.states import OUR_FIN, OUR_RST, OUR_SYN, State

_pack = WORD.pack


class Sender:
    """The sending half of `Mux`, and the state that both halves share."""

    def __init__(self, *, initiator: bool) -> None:
        self.outgoing = bytearray()
        self._lives = SessionTable(initiator=initiator)
        self._sessions = self._lives.sessions
        self._fragment = MAX_FRAGMENT  # octets; what the peer's MSS leaves of it
        self._atoms: set[int] = set()  # protocol ids of ours

    @property
    def live(self) -> int:
        """Sessions that are open in some direction. 0 and nothing more to open: the connection can be closed."""
        return self._lives.living

    @property
    def can_open(self) -> bool:
        """`open` would find an id. Look again whenever a session has ended and whenever the peer has answered."""
        return self._lives.ids.free

    def state(self, session: int) -> State:
        """Where a session id is in its life."""
        return self._sessions[session].state

    def credit(self, session: int) -> int:
        """Octets that `send` would take on this session, were there no other limit. 0 when it cannot send."""
        record = self._sessions[session]
        return record.credit if record.credit > 0 and record.state.sending else 0

    def allowance(self, session: int) -> int:
        """Octets that the peer may still send on this session: what must be held if nobody reads."""
        return self._sessions[session].allowance

    def open(self, protocol: int) -> int:
        """SYN: open a session and return its id. Data may be sent at once, before the peer answers.

        Raises `NoFreeSessionError` when `can_open` is False.
        """
        if not 0 <= protocol < FIRST_ATOM:  # else it is a port
            self._check_protocol(protocol)
        session = self._lives.open(protocol)
        self.outgoing += _pack(session.sid << 24 | SYN | protocol)
        return session.sid

    def accept(self, session: int) -> None:
        """Answer the peer's SYN by SYN, which opens our direction. The draft does not say which protocol id goes with
        it; we repeat the peer's.
        """
        record = self._sessions[session]
        if not record.state.called:
            raise LocalProtocolError(f"session {session} cannot be accepted: it is {record.state.name}")
        record.state = OUR_SYN[record.state]
        self.outgoing += _pack(session << 24 | SYN | record.protocol & FIELD)
        if record.held:
            self._say_held(record)

    def send(
        self, session: int, data: bytes | bytearray | memoryview, *, push: bool = False, finish: bool = False
    ) -> int:
        """Send the beginning of `data`; returns how many octets were taken, by credit, MSS and `MAX_FRAGMENTS`.

        `push` ends a record and `finish` our direction behind the last octet of `data`, when all of it was taken;
        otherwise repeat them with the rest. When octets are left and `credit` is 0, wait for `CreditAdded`. A
        memoryview must be one of octets.
        """
        record = self._sessions[session]
        size = len(data)
        if 0 < size <= record.credit and size <= self._fragment and record.state.sending and not finish:
            record.credit -= size
            outgoing = self.outgoing
            outgoing += _pack(session << 24 | size | (PUSH if push else 0))
            outgoing += data
            outgoing += PADDING[size & 3]
            return size
        return self._send_fragments(record, memoryview(data), push, finish)

    def finish(self, session: int) -> None:
        """FIN: our direction ends, the other goes on. As answer to a SYN: accepted, and we will not send."""
        record = self._sessions[session]
        self._lives.move(record, OUR_FIN)
        self.outgoing += _pack(session << 24 | FIN)
        if record.held:
            self._say_held(record)

    def reset(self, session: int, uri: str = "", text: str = "") -> None:
        """RST: both directions end, what is on its way is lost. As answer to a SYN: refused, and the draft's one error
        is that there is no such protocol. `uri` names an error, `text` explains it; both are cut to `MAX_TEXT` octets
        together.

        While the peer's answer is to come, we say FIN only, and a bare RST when it has come (`states`). The session
        then stays `live` until the answer; nothing is told about it any more.
        """
        record = self._sessions[session]
        before = record.state
        self._lives.move(record, OUR_RST)
        if before.calling:
            self.outgoing += _pack(session << 24 | FIN) if before is State.SYN_SENT else b""
            return
        payload = reason_to_wire(uri, text)
        self.outgoing += _pack(session << 24 | RST | len(payload)) + payload + PADDING[len(payload) & 3]

    def grant(self, session: int, octets: int) -> None:
        """AddCredit: let the peer send so many octets more; `UNLIMITED` cannot be taken back.

        Before the first SYN of an id it is added to the default; before our answer it waits for the answer; once the
        peer has finished it does nothing.
        """
        record = self._sessions[session]
        value = credit_to_wire(octets)
        if not record.opener or (record.state.over and record.life):
            raise LocalProtocolError(f"session {session} gets no credit: it is {record.state.name}")
        if record.state is State.SYN_RCVD:
            held = min(UNLIMITED, record.held + octets)
            credit_to_wire(held)
            record.held = held
        elif record.state.receiving or record.state.calling or record.state.over:
            record.allowance += octets
            self.outgoing += pack_control(Code.ADD_CREDIT, session, value)

    def set_default_credit(self, octets: int) -> None:
        """SetDefaultCredit: with how many octets sessions start for the peer, those it opens and those we do.

        It can only rise (the draft: "raise the default"): the peer may use the old one until it hears of the new one,
        and would be blamed. `UNLIMITED` is possible.
        """
        value = credit_to_wire(octets)
        self._lives.raise_allowance(octets)
        self.outgoing += pack_control(Code.SET_DEFAULT_CREDIT, 0, value)

    def set_mss(self, octets: int) -> None:
        """SetMSS: ask for fragments of at most so many octets; 0 for no limit. A wish: larger ones are read as well."""
        if not 0 <= octets <= MAX_LONG:
            raise LocalProtocolError(f"MSS of {octets} octets cannot be said; give 0 to {MAX_LONG}")
        self.outgoing += pack_control(Code.SET_MSS, 0, octets)

    def intern_atom(self, index: int, text: str) -> int:
        """InternAtom: from now on the protocol id returned stands for `text`, a URI, in what we say. Indices go from 0
        to 255 and may be used again. Raises `LocalProtocolError` beyond those and for more than `MAX_TEXT` octets.
        """
        if not 0 <= index < ATOMS:
            raise LocalProtocolError(f"atom index {index} is beyond {ATOMS - 1}")
        payload = atom_to_wire(text)
        self._atoms.add(FIRST_ATOM + index)
        self.outgoing += pack_control(Code.INTERN_ATOM, index, len(payload), payload)
        return FIRST_ATOM + index

    def define_endpoint(self, protocol: int) -> None:
        """DefineEndpoint: the peer may call us back as `protocol`, in practice an atom whose text is a URI."""
        self._check_protocol(protocol)
        self.outgoing += pack_control(Code.DEFINE_ENDPOINT, 0, protocol)

    def noop(self, payload: bytes = b"") -> None:
        """NoOp: says nothing, and is not answered."""
        self.outgoing += pack_control(Code.NO_OP, 0, len(payload), payload)

    def _send_fragments(self, session: Session, data: memoryview, push: bool, finish: bool) -> int:
        """What `send` does when its straight path does not fit: several fragments, none, FIN on the last."""
        if not session.state.sending:
            raise LocalProtocolError(f"session {session.sid} cannot send: it is {session.state.name}")
        size = len(data)
        taken = min(size, max(0, session.credit), self._fragment * MAX_FRAGMENTS)
        last = 0
        if taken == size:
            last = (PUSH if push else 0) | (FIN if finish else 0)
        for start in range(0, taken, self._fragment):
            end = min(start + self._fragment, taken)
            self._say(session.sid << 24 | (last if end == size else 0), data[start:end])
        if last and not size:
            self._say(session.sid << 24 | last, data)
        session.credit -= taken
        if last & FIN:
            self._lives.move(session, OUR_FIN)
        return taken

    def _say(self, word: int, payload: memoryview) -> None:
        size = len(payload)
        self.outgoing += _pack(word | size)
        self.outgoing += payload
        self.outgoing += PADDING[size & 3]

    def _say_held(self, session: Session) -> None:
        """After our answer: the credit that waited for it, unless the answer ended the session."""
        octets, session.held = session.held, 0
        if session.state.receiving:
            self.grant(session.sid, octets)

    def _check_protocol(self, protocol: int) -> None:
        check_protocol(protocol)
        if FIRST_ATOM <= protocol < FIRST_ATOM + ATOMS and protocol not in self._atoms:
            raise LocalProtocolError(f"atom {protocol:#x} was not interned by us")
