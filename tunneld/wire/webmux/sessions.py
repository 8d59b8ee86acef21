"""The 256 sessions of a connection: their states, their credit, and which id to open next. No bytes here. Pure.

**Credit** (draft-gettys-webmux-00, "Flow Control") counts the bytes of data payload, per session and direction; SYN,
FIN, RST and control messages are free. A session starts with the default that the receiver of the data announced,
AddCredit raises it, data uses it up. Both ends must count alike although their messages cross, hence these rules:

- SetDefaultCredit is for sessions that its sender opens or answers later. An announcement that crosses a SYN thus
  counts for that session at both ends: one sent it before its answer, the other receives it before the answer.
- AddCredit before the first SYN of an id is added to the default. Once an id has been used, AddCredit for a session
  that is not alive is late, sent before the end was received: it is ignored. (If it counted for the next generation of
  the id, we would exceed our credit.)
- We never send AddCredit between the peer's SYN and our answer; it waits for the answer. So AddCredit that arrives
  before the answer, on an id that the peer may still use for the previous generation (see below), is late too.

**Reuse of ids.** An id is free when both directions are closed, but what is closed for us is not yet closed for the
peer: nothing acknowledges a RST, and what the peer sent before it saw ours (data, FIN, AddCredit, a RST of its own)
would count for the next generation. The draft has no answer to that. There is a proof, though: TCP keeps the order, so
a peer that answers a SYN has read everything we sent before it. Free ids therefore wait in three queues, oldest first:

    settled     the peer has nothing more to send: never used, ended by its RST, or proven as above
    finished    FIN both ways; at most an AddCredit or a RST can be late
    reset       ended by our RST; data, FIN, AddCredit or a RST can be late, but not an answer (`states`, WITHDRAWN)

`SessionIds.allocate` prefers them in that order. It does not use the reset queue while an answer is outstanding that
will settle its first id. Without such an answer, the id that was reset least recently is the best choice: should a RST
or FIN be late after all, it passes for the answer, the new session fails, and no byte is misdelivered.
"""

from __future__ import annotations

from collections import deque

from tunneld.errors import LimitReachedError, LocalProtocolError
from tunneld.wire.webmux.header import DEFAULT_CREDIT, FIRST_ACCEPTOR_ID, FIRST_INITIATOR_ID, SESSION_IDS
from tunneld.wire.webmux.states import FAULT, OUR_SYN, PEER, PEER_RST, RESET, US, Party, State, Transition


class Session:
    """One of the 256 session ids. It is alive many times, once per generation; between generations the credit is what
    AddCredit granted before the first.
    """

    __slots__ = (
        "allowance",
        "credit",
        "default_credit",
        "generation",
        "opener",
        "pending_grant",
        "protocol",
        "sid",
        "state",
        "unsettled",
    )

    def __init__(self, sid: int, opener: Party | None) -> None:
        """`opener` is the party that may open the id, None for a reserved one."""
        self.sid = sid
        self.opener = opener
        self.state = State.IDLE
        self.generation = 0  # the current or the last one; 0: the id was never used
        self.credit = 0  # bytes we may send
        self.default_credit = 0  # the peer's default, as far as it is in `credit`
        self.allowance = 0  # bytes the peer may send
        self.pending_grant = 0  # bytes of allowance to grant right after our answer
        self.protocol = 0
        self.unsettled = False  # opened by us although the peer may still send for the previous generation


class NoFreeSessionError(LimitReachedError):
    """All 127 ids that this side may open are in use, or the peer may still send for them. Nothing was sent; try again
    when `Mux.can_open` is true.
    """


class SessionIds:
    """The ids that one side may open: every second one from `first` on."""

    def __init__(self, first: int) -> None:
        self._settled = deque(range(first, SESSION_IDS, 2))
        self._finished: deque[tuple[int, int]] = deque()  # (id, number of SYNs sent when it was closed)
        self._reset: deque[tuple[int, int]] = deque()
        self._unanswered: dict[int, int] = {}  # id -> number of its SYN, in that order
        self._syns = 0

    @property
    def unanswered(self) -> tuple[int, ...]:
        """Ids we have opened that the peer has not answered."""
        return tuple(self._unanswered)

    @property
    def available(self) -> bool:
        """Whether `allocate` would succeed."""
        return bool(self._settled or self._finished or (self._reset and not self._settling()))

    @property
    def waiting(self) -> list[int]:
        """All ids that are not in use, in no particular order."""
        return [*self._settled, *(sid for sid, _ in (*self._finished, *self._reset))]

    @property
    def safely_available(self) -> bool:
        """Whether `allocate` would return an id on which no data, FIN or answer can be late."""
        return bool(self._settled or self._finished)

    def allocate(self) -> tuple[int, bool]:
        """Take the next id to open. Returns it, and whether it is settled. Raises `NoFreeSessionError`."""
        is_settled = bool(self._settled)
        if is_settled:
            sid = self._settled.popleft()
        elif self.available:
            sid = (self._finished or self._reset).popleft()[0]
        else:
            raise NoFreeSessionError("could not open a session: all of the connection are in use")
        self._syns += 1
        self._unanswered[sid] = self._syns
        return sid, is_settled

    def answered(self, sid: int) -> None:
        """The peer answered the SYN of `sid`: all ids closed before that SYN was sent are settled."""
        syn = self._unanswered.pop(sid)
        for queue in (self._finished, self._reset):
            while queue and queue[0][1] < syn:
                self._settled.append(queue.popleft()[0])

    def finished(self, sid: int) -> None:
        """`sid` ended with FIN in both directions."""
        self._finished.append((sid, self._syns))

    def reset(self, sid: int) -> None:
        """`sid` ended with our RST; it can be unanswered only if the peer broke the rules."""
        self._unanswered.pop(sid, None)
        self._reset.append((sid, self._syns))

    def settled(self, sid: int) -> None:
        """The peer sent RST on `sid`, before or after our end of it: it sends nothing more for this generation."""
        for queue in (self._finished, self._reset):
            for entry in queue:
                if entry[0] == sid:
                    queue.remove(entry)
                    break
        if sid not in self._settled:
            self._settled.append(sid)

    def _settling(self) -> bool:
        """Whether an answer is outstanding that settles the first of the reset ids."""
        return next(reversed(self._unanswered.values()), 0) > self._reset[0][1]


class SessionTable:
    """All sessions of a connection, every state transition of them, and the default credit of new ones."""

    def __init__(self, *, initiator: bool) -> None:
        first = FIRST_INITIATOR_ID if initiator else FIRST_ACCEPTOR_ID
        reserved: list[Party | None] = [None] * FIRST_INITIATOR_ID
        by_parity: list[Party | None] = [US, PEER] if initiator else [PEER, US]
        self._openers = reserved + by_parity * ((SESSION_IDS - FIRST_INITIATOR_ID) // 2)
        self.sessions: list[Session | None] = [None] * SESSION_IDS  # None: never used; `get` makes it
        self.ids = SessionIds(first)
        self.default_credit = DEFAULT_CREDIT  # bytes that we may send
        self.has_new_default = False  # that is not in the credit of the unanswered sessions yet
        self._raised: list[Session] = []  # sessions answered since then, whose credit has it
        self.default_allowance = DEFAULT_CREDIT  # bytes that the peer may send

    def get(self, sid: int) -> Session:
        """The session with this id. Most connections use few of them, and 256 take 36 KiB."""
        session = self.sessions[sid]
        if session is None:
            session = self.sessions[sid] = Session(sid, self._openers[sid])
        return session

    @property
    def alive(self) -> int:
        """The number of sessions that are alive."""
        return sum(session is not None and not session.state.over for session in self.sessions)

    def open(self, protocol: int) -> Session:
        """Begin a generation with our SYN. Raises `NoFreeSessionError`."""
        sid, is_settled = self.ids.allocate()
        session = self.sessions[sid] or self.get(sid)
        session.unsettled = not is_settled
        self.begin(session, OUR_SYN, protocol)
        return session

    def begin(self, session: Session, syn: Transition, protocol: int) -> None:
        """Begin a generation with our SYN or the peer's."""
        session.state = syn[session.state]
        session.generation += 1
        session.protocol = protocol
        session.credit += self.default_credit
        session.default_credit = self.default_credit
        session.allowance += self.default_allowance

    def move(self, session: Session, transition: Transition) -> None:
        """Apply a transition, whether or not the session is alive.

        Raises `LocalProtocolError`, and changes nothing, if the table does not have it.
        """
        before = session.state
        after = transition.get(before)
        if after is None:
            party, signal = transition.party.name, transition.signal.name
            raise LocalProtocolError(f"session {session.sid} is {before.name}: no {signal} from {party}")
        session.state = after
        if before.unanswered and not after.unanswered and transition is not FAULT:
            session.unsettled = False
            if self._apply_default(session):
                self._raised.append(session)
            self.ids.answered(session.sid)
        if after.over and not before.over:
            session.credit = session.allowance = session.pending_grant = 0
            if session.opener is US:
                self._free(session.sid, transition, after)
        elif transition is PEER_RST and session.opener is US:  # late
            self.ids.settled(session.sid)

    def raise_credit(self, size: int) -> None:
        """Take note of the peer's SetDefaultCredit. It also applies to sessions that are open and unanswered (see the
        rules above): `apply_default_credit` must follow before anything else is received. So a flood of this message
        does not touch all sessions each time.
        """
        self.default_credit = size
        self.has_new_default = True

    def apply_default_credit(self) -> list[Session]:
        """Add the latest default to the credit of unanswered sessions. Returns the ones whose credit it changed."""
        self.has_new_default = False
        raised, self._raised = self._raised, []
        for sid in self.ids.unanswered:
            session = self.get(sid)
            if self._apply_default(session):
                raised.append(session)
        return raised

    def _apply_default(self, session: Session) -> bool:
        more = self.default_credit - session.default_credit
        session.credit += more
        session.default_credit = self.default_credit
        return more != 0

    def raise_allowance(self, size: int) -> None:
        """Apply our SetDefaultCredit. Raises `LocalProtocolError` if the default would fall."""
        more = size - self.default_allowance
        if more < 0:
            raise LocalProtocolError(f"default credit cannot fall from {self.default_allowance} to {size} bytes")
        self.default_allowance = size
        for session in self.sessions:
            if session is not None and session.state.incoming:
                session.allowance += more

    def _free(self, sid: int, transition: Transition, after: State) -> None:
        """Put an id of ours into the queue for its next generation."""
        if transition is PEER_RST:
            self.ids.settled(sid)
        elif after is RESET:
            self.ids.reset(sid)
        else:
            self.ids.finished(sid)
