"""The items of `Mux.receive`. Pure values.

Data has no class: it is the tuple (session, payload, push), because thousands of them arrive per second and an object
for each would cost as much as everything else (a test shows that the tuple means what the state table says). All other
events are rare. Events that every session has once are created once and shared; events are immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tunneld.wire.webmux.header import SESSION_IDS

Data = tuple[int, memoryview, bool]
"""(session, payload, push): bytes of a session, in order. `payload` is a slice of the data given to `receive`: use or
copy it before that memory is overwritten. `push` (PUSH) means that a record ends after it; only then may it be empty.
"""


@dataclass(frozen=True, slots=True)
class Opened:
    """SYN of the peer: answer with `accept`, `finish` (accepted, will not send) or `reset` (refused). Data may follow
    before the answer. `protocol` is a port, an atom (see `Mux.peer_atom`) or assigned by the server.
    """

    session: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The peer answered our SYN with SYN or FIN; after FIN, `Finished` follows at once."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """The peer answered our SYN with RST: the session is over. `uri` and `text` give the reason; both may be empty."""

    session: int
    uri: str
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """FIN: the peer sends no more data on this session; our direction stays open."""

    session: int


@dataclass(frozen=True, slots=True)
class Reset:
    """RST of an open session: both directions are over, data in flight is lost."""

    session: int
    uri: str
    text: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke the protocol on this session. We have reset the session; the connection goes on."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class CreditAdded:
    """The credit of a session that can send has grown to `credit` bytes; 2^62 and more means unlimited."""

    session: int
    credit: int


@dataclass(frozen=True, slots=True)
class DefaultCreditSet:
    """SetDefaultCredit: future sessions start with `credit` bytes that we may send."""

    credit: int


@dataclass(frozen=True, slots=True)
class MssSet:
    """SetMSS: from now on our fragments have at most `size` bytes of payload; 0 is no limit."""

    size: int


@dataclass(frozen=True, slots=True)
class AtomInterned:
    """InternAtom: in the peer's messages, the protocol id `protocol` stands for `text`."""

    protocol: int
    text: str


@dataclass(frozen=True, slots=True)
class EndpointDefined:
    """DefineEndpoint: the peer can be called back as `protocol`. `uri` is the text of that atom; None if `protocol` is
    not an atom, or one that was never interned.
    """

    protocol: int
    uri: str | None


Event = (
    Opened
    | Accepted
    | SessionRefused
    | Finished
    | Reset
    | Broken
    | CreditAdded
    | DefaultCreditSet
    | MssSet
    | AtomInterned
    | EndpointDefined
)
Item = Data | Event

ACCEPTED: Final = tuple(map(Accepted, range(SESSION_IDS)))
FINISHED: Final = tuple(map(Finished, range(SESSION_IDS)))
"""The shared events, by session id."""

opened_event = lru_cache(maxsize=4 * SESSION_IDS)(Opened)
"""Create or reuse an `Opened`: nearly all sessions are for the same protocol."""
