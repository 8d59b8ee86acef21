"""Two ends of a connection, and the model of each session that the test of both keeps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tests.wire.webmux.helpers import take_output
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.sessions import SessionIds
from tunneld.wire.webmux.states import State


@dataclass
class Direction:
    """One direction of one session."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    record_ends_sent: list[int] = field(default_factory=list)
    record_ends_received: list[int] = field(default_factory=list)
    finished: bool = False  # by the sender
    ended: bool = False  # as reported to the receiver


@dataclass
class SessionModel:
    """One session from SYN to its end: `directions[i]` is what end i sends."""

    directions: tuple[Direction, Direction] = field(default_factory=lambda: (Direction(), Direction()))
    reset: bool = False


class CodecEnd:
    """A `Mux`, the models of its sessions, and the pipe to the other end."""

    def __init__(self, number: int, lowest: int) -> None:
        self.number = number
        self.mux = Mux(initiator=number == 0)
        self.mux.table.ids = SessionIds(lowest + number)  # a high `lowest` leaves few ids, which are reused soon
        self.models: dict[int, SessionModel] = {}
        self.pipe = bytearray()
        self.opened: dict[int, deque[SessionModel]] = {}  # sessions whose SYN the other end has not received

    def flush(self) -> None:
        self.pipe += take_output(self.mux)

    def in_state(self, *states: State) -> list[int]:
        return [session for session in self.models if self.mux.state(session) in states]
