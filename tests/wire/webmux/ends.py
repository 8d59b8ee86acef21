"""What two joined ends remember of each other's sessions."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tests.wire.webmux.helpers import take
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.sessions import SessionIds
from tunneld.wire.webmux.states import State


@dataclass
class Way:
    """One direction of one life of a session."""

    sent: bytearray = field(default_factory=bytearray)
    heard: bytearray = field(default_factory=bytearray)
    marks_sent: list[int] = field(default_factory=list)  # where records end
    marks_heard: list[int] = field(default_factory=list)
    finished: bool = False  # by the sender
    ended: bool = False  # as the receiver has heard


@dataclass
class Life:
    """A session from SYN to its end, as both ends see it: `ways[i]` is what end i says."""

    ways: tuple[Way, Way] = field(default_factory=lambda: (Way(), Way()))
    reset: bool = False


class End:
    """A `Mux`, the lives that it knows, and the pipe to the other end."""

    def __init__(self, number: int, lowest: int) -> None:
        self.number = number
        self.mux = Mux(initiator=number == 0)
        self.mux._lives.ids = SessionIds(lowest + number)  # where these are few, they are soon used again
        self.lives: dict[int, Life] = {}
        self.pipe = bytearray()
        self.calls: dict[int, deque[Life]] = {}  # lives that the other end has not heard of

    def flush(self) -> None:
        self.pipe += take(self.mux)

    def where(self, *states: State) -> list[int]:
        return [session for session in self.lives if self.mux.state(session) in states]
