"""The messages that a WebMUX endpoint sends: each method appends complete messages to `outgoing`. Pure.

Every action is checked against the state table before anything is appended, so a refused one (`LocalProtocolError`, a
bug of the caller) changes nothing.
"""

from __future__ import annotations

from typing import Final

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
from tunneld.wire.webmux.states import OUR_FIN, OUR_RST, OUR_SYN, SYN_RCVD, State

_pack: Final = WORD.pack


class Sender:
    """The sending half of `Mux`, and the state that both halves share. `session` arguments are session ids."""

    def __init__(self, *, initiator: bool) -> None:
        self.outgoing = bytearray()
        self.table = SessionTable(initiator=initiator)
        self._sessions = self.table.sessions
        self._max_fragment = MAX_FRAGMENT  # bytes of payload; the peer's MSS lowers it
        self._atoms: set[int] = set()  # protocol ids that we interned
        self._peer_atoms: dict[int, str] = {}  # what the peer interned, by protocol id

    @property
    def live(self) -> int:
        """The number of sessions that are alive. If it is 0 and none is to be opened, the connection can be closed."""
        return self.table.alive

    @property
    def can_open(self) -> bool:
        """Whether `open` would find an id. It can change when a session ends and when the peer answers a SYN."""
        return self.table.ids.available

    def session(self, session: int) -> Session:
        """The record of a session, the same for all its generations: for a caller that needs its credit often."""
        return self._sessions[session] or self.table.get(session)

    def state(self, session: int) -> State:
        """The state of a session."""
        return self.table.get(session).state

    def credit(self, session: int) -> int:
        """The bytes that the peer's credit allows to send; 0 if the session cannot send."""
        record = self._sessions[session] or self.table.get(session)
        return record.credit if record.credit > 0 and record.state.sending else 0

    def allowance(self, session: int) -> int:
        """The bytes that the peer may still send: what must be buffered if the caller does not read."""
        return self.table.get(session).allowance

    def open(self, protocol: int) -> int:
        """SYN: open a session and return its id. Data may be sent at once, before the peer answers. `protocol` is a
        port, or an atom of ours or of the peer's.

        Raises `NoFreeSessionError` if `can_open` is False.
        """
        if not 0 <= protocol < FIRST_ATOM and protocol not in self._peer_atoms:  # a port needs no check
            self._check_protocol(protocol)
        session = self.table.open(protocol)
        self.outgoing += _pack(session.sid << 24 | SYN | protocol)
        return session.sid

    def accept(self, session: int) -> None:
        """Answer the peer's SYN with SYN, which opens our direction. The draft does not say which protocol id this SYN
        has; we repeat the peer's.
        """
        record = self._sessions[session] or self.table.get(session)
        if not record.state.incoming:
            raise LocalProtocolError(f"session {session} cannot be accepted: it is {record.state.name}")
        record.state = OUR_SYN[record.state]
        self.outgoing += _pack(session << 24 | SYN | record.protocol & FIELD)
        if record.pending_grant:
            self._send_pending_grant(record)

    def send(
        self, session: int, data: bytes | bytearray | memoryview, *, push: bool = False, finish: bool = False
    ) -> int:
        """Send the beginning of `data`. Returns how many bytes were taken; credit, MSS and `MAX_FRAGMENTS` limit it.

        `push` ends a record and `finish` our direction after the last byte of `data`, if all of it was taken; otherwise
        repeat them with the rest. If bytes are left and `credit` is 0, wait for `CreditAdded`. A memoryview must have
        format B.
        """
        record = self._sessions[session] or self.table.get(session)
        size = len(data)
        if 0 < size <= record.credit and size <= self._max_fragment and record.state.sending and not finish:
            record.credit -= size
            outgoing = self.outgoing
            outgoing += _pack(session << 24 | size | (PUSH if push else 0))
            outgoing += data
            outgoing += PADDING[size & 3]
            return size
        return self._send_fragments(record, memoryview(data), push, finish)

    def finish(self, session: int) -> None:
        """FIN: end our direction; the other stays open. As answer to a SYN: accepted, and we will not send."""
        record = self._sessions[session] or self.table.get(session)
        self.table.move(record, OUR_FIN)
        self.outgoing += _pack(session << 24 | FIN)
        if record.pending_grant:
            self._send_pending_grant(record)

    def reset(self, session: int, uri: str = "", text: str = "") -> None:
        """RST: end both directions; data in flight is lost. As answer to a SYN: refused, for which the draft knows one
        error, that there is no such protocol. `uri` identifies an error, `text` explains it; together they are
        truncated to `MAX_TEXT` bytes.

        While the peer's answer is outstanding, we send FIN only, and a bare RST after the answer (`states`). The
        session counts as `live` until then, but no event of it is reported any more.
        """
        record = self.table.get(session)
        before = record.state
        self.table.move(record, OUR_RST)
        if before.opening:
            self.outgoing += _pack(session << 24 | FIN) if before is State.SYN_SENT else b""
            return
        payload = reason_to_wire(uri, text)
        self.outgoing += _pack(session << 24 | RST | len(payload)) + payload + PADDING[len(payload) & 3]

    def grant(self, session: int, size: int) -> None:
        """AddCredit: allow the peer to send `size` more bytes; `UNLIMITED` cannot be revoked.

        Before the first SYN of an id it is added to the default; before our answer it waits for the answer; after the
        peer's FIN it does nothing.
        """
        record = self.table.get(session)
        value = credit_to_wire(size)
        if not record.opener or (record.state.over and record.generation):
            raise LocalProtocolError(f"session {session} cannot be granted credit: it is {record.state.name}")
        if record.state is SYN_RCVD:
            pending = min(UNLIMITED, record.pending_grant + size)
            credit_to_wire(pending)
            record.pending_grant = pending
        elif record.state.receiving or record.state.opening or record.state.over:
            record.allowance += size
            self.outgoing += pack_control(Code.ADD_CREDIT, session, value)

    def set_default_credit(self, size: int) -> None:
        """SetDefaultCredit: the bytes that the peer may send on a new session, whichever side opens it.

        It can only rise (the draft: "raise the default"): the peer may use the old default until it receives the new
        one, and would appear to exceed it. `UNLIMITED` is possible.
        """
        value = credit_to_wire(size)
        self.table.raise_allowance(size)
        self.outgoing += pack_control(Code.SET_DEFAULT_CREDIT, 0, value)

    def set_mss(self, size: int) -> None:
        """SetMSS: ask for fragments of at most `size` bytes of payload; 0: no limit. Larger ones are still accepted."""
        if not 0 <= size <= MAX_LONG:
            raise LocalProtocolError(f"MSS of {size} bytes is out of range; use 0 to {MAX_LONG}")
        self.outgoing += pack_control(Code.SET_MSS, 0, size)

    def intern_atom(self, index: int, text: str) -> int:
        """InternAtom: from now on the returned protocol id stands for `text`, a URI, in our messages. `index` is 0 to
        255; an index can be used again. Raises `LocalProtocolError` for other indices and for more than `MAX_TEXT`
        bytes.
        """
        if not 0 <= index < ATOMS:
            raise LocalProtocolError(f"atom index {index} is out of range; the largest is {ATOMS - 1}")
        payload = atom_to_wire(text)
        self._atoms.add(FIRST_ATOM + index)
        self.outgoing += pack_control(Code.INTERN_ATOM, index, len(payload), payload)
        return FIRST_ATOM + index

    def define_endpoint(self, protocol: int) -> None:
        """DefineEndpoint: the peer can call us back as `protocol`, in practice an atom whose text is a URI."""
        self._check_protocol(protocol)
        self.outgoing += pack_control(Code.DEFINE_ENDPOINT, 0, protocol)

    def noop(self, payload: bytes = b"") -> None:
        """NoOp: no effect and no answer."""
        self.outgoing += pack_control(Code.NO_OP, 0, len(payload), payload)

    def _send_fragments(self, session: Session, data: memoryview, push: bool, finish: bool) -> int:
        """The general case of `send`: several fragments or none, FIN on the last."""
        if not session.state.sending:
            raise LocalProtocolError(f"session {session.sid} cannot send: it is {session.state.name}")
        size = len(data)
        taken = min(size, max(0, session.credit), self._max_fragment * MAX_FRAGMENTS)
        last_flags = 0
        if taken == size:
            last_flags = (PUSH if push else 0) | (FIN if finish else 0)
        for start in range(0, taken, self._max_fragment):
            end = min(start + self._max_fragment, taken)
            self._write_fragment(session.sid << 24 | (last_flags if end == size else 0), data[start:end])
        if last_flags and not size:
            self._write_fragment(session.sid << 24 | last_flags, data)
        session.credit -= taken
        if last_flags & FIN:
            self.table.move(session, OUR_FIN)
        return taken

    def _write_fragment(self, word: int, payload: memoryview) -> None:
        size = len(payload)
        self.outgoing += _pack(word | size)
        self.outgoing += payload
        self.outgoing += PADDING[size & 3]

    def _send_pending_grant(self, session: Session) -> None:
        """Grant the credit that waited for our answer, unless the answer ended the session."""
        size, session.pending_grant = session.pending_grant, 0
        if session.state.receiving:
            self.grant(session.sid, size)

    def _check_protocol(self, protocol: int) -> None:
        check_protocol(protocol)
        if FIRST_ATOM <= protocol < FIRST_ATOM + ATOMS and protocol not in self._atoms:
            raise LocalProtocolError(f"atom {protocol:#x} was not interned by us")
