"""What is known of one session id: its state, and the credit of its two directions. Pure.

Credit (draft-gettys-webmux-00, "Flow Control") counts the octets of data payload, per session and direction; SYN, FIN,
RST and control messages are free. A life starts with the default that the receiver of data had announced, AddCredit
raises it, data uses it up. Both ends must count alike, although their messages cross; hence these rules:

- SetDefaultCredit is for sessions that its sender opens or answers later. An announcement that crosses a SYN thus
  counts for that session at both ends: one has sent it before its answer, the other hears it before the answer.
- AddCredit before the first SYN of an id is added to the default. Once an id has been used, AddCredit outside of a life
  is late, said before the end was heard: it is ignored. (Counted for the next life, it would make us exceed.)
- We never say AddCredit between the peer's SYN and our answer, it waits for the answer. So what comes before the answer
  on an id that the peer may not have forgotten (`ids`) is late, too.

Which session id to open next. Pure.

An id is free again when both directions are closed, but closed for us is not yet closed for the peer: nothing
acknowledges a RST, and what the peer sent before it saw ours (data, FIN, AddCredit, a RST of its own) would be taken
for part of the next life. The draft has no answer to that. There is a proof, though: TCP keeps the order, so a peer
that answers a SYN has read everything we said before it. Free ids therefore wait in three rows, oldest first:

    settled     the peer has nothing more to say: never used, ended by its RST, or proven as above
    finished    FIN both ways; at most an AddCredit or a RST can be late
    reset       ended by our RST; data, FIN, AddCredit or a RST can be late, but not an answer (`states`, WITHDRAWN)

`take` prefers them in that order. It leaves the row of the reset alone while an answer that settles its first is still
to come. Without one, the id that was reset least recently is the best there is: should a RST or FIN be late after all,
it passes for the answer, the new session fails, and no octet goes astray.

All session ids of one connection: which of them live, and every move from state to state. Pure.

No octets here: `sender` and `mux` say and hear them, and this keeps the books that both of them read.
"""

from __future__ import annotations

from collections import deque

from tunneld.errors import LimitReachedError, LocalProtocolError
from tunneld.wire.webmux.header import DEFAULT_CREDIT, FIRST_ACCEPTOR_ID, FIRST_INITIATOR_ID, SESSION_IDS
from tunneld.wire.webmux.states import FAULT, OUR_SYN, PEER, PEER_RST, RESET, US, State, StateColumn, Who


class Session:
    """One of 256. Lives many times; between lives the credit is what AddCredit said before the first."""

    __slots__ = ("allowance", "credit", "held", "life", "opener", "protocol", "sid", "state", "unsettled")

    def __init__(self, sid: int, opener: Who | None) -> None:
        """`opener` is who may open it, None for one that is reserved."""
        self.sid = sid
        self.opener = opener
        self.state = State.IDLE
        self.life = 0  # which it is, or was last; 0: none yet
        self.credit = 0  # octets we may send
        self.allowance = 0  # octets the peer may send
        self.held = 0  # octets of allowance to be said right after our answer
        self.protocol = 0
        self.unsettled = False  # opened by us although the peer may still talk about the life before


class NoFreeSessionError(LimitReachedError):
    """All 127 ids that this side may open are in use, or not yet forgotten by the peer. Nothing was sent; try again
    when `Mux.can_open` says so.
    """


class SessionIds:
    """The ids of one side: every second one from `first` on."""

    def __init__(self, first: int) -> None:
        self._settled = deque(range(first, SESSION_IDS, 2))
        self._finished: deque[tuple[int, int]] = deque()  # (id, SYNs sent when it was closed)
        self._reset: deque[tuple[int, int]] = deque()
        self._calling: dict[int, int] = {}  # id -> which of our SYNs it was, in that order
        self._syns = 0

    @property
    def calling(self) -> tuple[int, ...]:
        """Ids we have opened that the peer has not answered."""
        return tuple(self._calling)

    @property
    def free(self) -> bool:
        """`take` would give one."""
        return bool(self._settled or self._finished or (self._reset and not self._settling()))

    def take(self) -> tuple[int, bool]:
        """The next id to open, and whether it is settled. Raises `NoFreeSessionError`."""
        settled = bool(self._settled)
        if settled:
            sid = self._settled.popleft()
        elif self.free:
            sid = (self._finished or self._reset).popleft()[0]
        else:
            raise NoFreeSessionError("could not open a session: all of the connection are in use")
        self._syns += 1
        self._calling[sid] = self._syns
        return sid, settled

    def answered(self, sid: int) -> None:
        """The peer has answered the SYN of `sid`: all that we closed before that SYN is settled."""
        syn = self._calling.pop(sid)
        for row in (self._finished, self._reset):
            while row and row[0][1] < syn:
                self._settled.append(row.popleft()[0])

    def finished(self, sid: int) -> None:
        """`sid` ended by FIN both ways."""
        self._finished.append((sid, self._syns))

    def reset(self, sid: int) -> None:
        """`sid` ended by our RST; unanswered only when the peer broke the rules."""
        self._calling.pop(sid, None)
        self._reset.append((sid, self._syns))

    def settled(self, sid: int) -> None:
        """The peer has sent RST on `sid`, before or after the end for us: that was its last word."""
        for row in (self._finished, self._reset):
            for entry in row:
                if entry[0] == sid:
                    row.remove(entry)
                    break
        if sid not in self._settled:
            self._settled.append(sid)

    def _settling(self) -> bool:
        """An answer is to come that settles the first of the reset ids."""
        return next(reversed(self._calling.values()), 0) > self._reset[0][1]


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
