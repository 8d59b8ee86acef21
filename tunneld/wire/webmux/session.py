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
"""

from __future__ import annotations

from tunneld.wire.webmux.states import State, Who


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
