"""Which session id to open next. Pure.

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
"""

from __future__ import annotations

from collections import deque

from tunneld.errors import LimitReachedError
from tunneld.wire.webmux.limits import SESSION_IDS


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
