"""What `Mux.receive` tells besides data. Pure values; all of them are rare.

Data has no class: it is the tuple (session, payload, push), because thousands of them arrive a second and building an
object for each would cost as much as all the rest (a test shows that the tuple means what the state table says). What
every session has one of is made once and told again: events are values, and nobody can change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tunneld.wire.webmux.header import SESSION_IDS

Data = tuple[int, memoryview, bool]
"""(session, payload, push): octets of a session in order. `payload` is a slice of what was given to `receive`: use or
copy it before that memory is written again. `push` says that a record ends behind it (PUSH); only then may it be empty.
"""


@dataclass(frozen=True, slots=True)
class Opened:
    """SYN of the peer: answer by `accept`, `finish` (accepted, will not send) or `reset` (refused). Data may follow
    before you do. `protocol` is a port, an atom (see `Mux.peer_atom`) or assigned by the server.
    """

    session: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The peer has answered our SYN, by SYN or by FIN; in the second case `Finished` follows at once."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """The peer has answered our SYN by RST: the session is over. `uri` and `text` say why, often not at all."""

    session: int
    uri: str
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """FIN: the peer sends no more data on this session; our direction goes on."""

    session: int


@dataclass(frozen=True, slots=True)
class Reset:
    """RST of a session that was open: it is over in both directions, data on the way is lost."""

    session: int
    uri: str
    text: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke a rule on this session. It has been reset and is over; the connection goes on."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class CreditAdded:
    """More may be sent on a session that can send: `credit` octets in all, 2^62 and more when unlimited."""

    session: int
    credit: int


@dataclass(frozen=True, slots=True)
class DefaultCreditSet:
    """SetDefaultCredit: sessions to come start with `credit` octets for us."""

    credit: int


@dataclass(frozen=True, slots=True)
class MssSet:
    """SetMSS: from now on our fragments carry at most `octets` of payload; 0 is no limit."""

    octets: int


@dataclass(frozen=True, slots=True)
class AtomInterned:
    """InternAtom: the peer will say `protocol` and mean `text`."""

    protocol: int
    text: str


@dataclass(frozen=True, slots=True)
class EndpointDefined:
    """DefineEndpoint: the peer can be called back as `protocol`. `uri` is the text of that atom; None when `protocol`
    is no atom or one that was never interned.
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

ACCEPTED = tuple(map(Accepted, range(SESSION_IDS)))
FINISHED = tuple(map(Finished, range(SESSION_IDS)))
"""One for each session."""

opened = lru_cache(maxsize=4 * SESSION_IDS)(Opened)
"""Those made lately: what is called is nearly always the same."""
