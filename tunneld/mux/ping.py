"""How a carrier pings its peer: a WebMUX session for a protocol that no program serves.

NoOp is WebMUX's only idle message, and it has no answer. But a SYN must be answered, and one for a protocol that is not
served is answered by RST. Because TCP keeps the order, the answer also proves that the peer has read everything that
was sent before the ping.
"""

from __future__ import annotations

from typing import Final

from tunneld.wire.webmux.mux import Mux

PING_PROTOCOL: Final = 0
"""The protocol id of a ping: TCP port 0."""


class PingSession:
    """At most one outstanding ping of a carrier."""

    __slots__ = ("_mux", "repeat", "sid")

    def __init__(self, mux: Mux) -> None:
        self.sid: int | None = None  # the session of the outstanding ping
        self.repeat = False  # ping again once it is answered: more was sent since that the peer is to confirm
        self._mux = mux

    @property
    def outstanding(self) -> bool:
        """Whether the peer has yet to answer."""
        return self.sid is not None

    def send(self) -> bool:
        """Append a ping to the codec's output, unless one is outstanding or no session id is free; returns whether."""
        if self.outstanding or not self._mux.can_open:
            return False
        self.sid = self._mux.open(PING_PROTOCOL)
        return True

    def finish(self, *, accepted: bool) -> bool:
        """The peer answered, or broke the session; if it `accepted` the session, that is reset.

        Returns whether the caller must ping again.
        """
        sid, self.sid = self.sid, None
        if accepted and sid is not None:
            self._mux.reset(sid)
        repeat, self.repeat = self.repeat, False
        return repeat
