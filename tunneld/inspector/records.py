"""What is kept of a request and its response: an `Exchange`. Times are seconds since 1970."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

Headers = list[tuple[str, str]]
"""Field lines in their order, as they were sent (ISO 8859-1)."""

REQUEST, RESPONSE = 0, 1
"""The two sides of a connection: what the visitor sends, and what the local server does."""

KIB = 1024
EXCHANGE_COST = 2 * KIB
"""Bytes that an exchange costs beside what it keeps: objects of Python."""
FIELD_COST = 200
"""The same for a field line."""
FRAME_COST = 300
"""The same for a frame."""


@dataclass(slots=True, eq=False)
class SeenMessage:
    """A request or a response, as far as it has passed."""

    version: str
    headers: Headers
    began: float
    body: bytearray = field(default_factory=bytearray)
    """The first bytes of the body, without the framing of chunks."""
    size: int = 0
    """Bytes of the body that have passed."""
    lost: int = 0
    """Bytes of it that would have been kept, had the inspector kept up."""
    trailers: Headers = field(default_factory=list)
    ended: float | None = None

    def header(self, name: str) -> str:
        """All values of a field, joined with commas; empty if there is none."""
        return ", ".join(value for key, value in self.headers if key.lower() == name)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the body are kept."""
        return self.ended is not None and not self.lost and len(self.body) == self.size


@dataclass(slots=True, eq=False)
class SeenRequest(SeenMessage):
    """A request."""

    method: str = ""
    target: str = ""


@dataclass(slots=True, eq=False)
class SeenResponse(SeenMessage):
    """A response."""

    status: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SeenFrame:
    """A frame of a WebSocket."""

    is_request: bool
    """Whether the visitor has sent it."""
    opcode: int
    is_final: bool
    data: bytes
    """Its first bytes, unmasked, and decompressed unless `compressed`."""
    size: int
    """Bytes that have passed."""
    compressed: bool
    """Whether it is compressed, and could not be decompressed."""
    time: float


@dataclass(slots=True, eq=False)
class Exchange:
    """A request, its response and what follows an upgrade; or a connection that is not HTTP, without a request."""

    id: int
    exposure: str
    visitor: str
    began: float
    request: SeenRequest | None = None
    response: SeenResponse | None = None
    interim: list[int] = field(default_factory=list)
    """The statuses of interim responses, such as 103."""
    upgrade: str = ""
    """The protocol after an upgrade, such as `websocket`."""
    frames: deque[SeenFrame] = field(default_factory=deque)
    """The newest frames of a WebSocket."""
    frames_seen: int = 0
    frame_bytes: int = 0
    """Bytes of the frames that are kept."""
    ended: float | None = None
    note: str = ""
    """Why it is incomplete or not shown."""
    replay_of: int | None = None
    cost: int = EXCHANGE_COST
    """Bytes of memory, estimated."""
    is_kept: bool = True
    """False once it was dropped from the store: nothing more is kept of it."""


def cost_of_headers(headers: Headers) -> int:
    """Bytes that field lines cost."""
    return sum(FIELD_COST + len(name) + len(value) for name, value in headers)
