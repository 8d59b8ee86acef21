"""Two ends joined by memory, and items in a form that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hypothesis import HealthCheck, settings

from tunneld.wire.webmux.events import Broken, Event, Item
from tunneld.wire.webmux.header import FIELD, LONG, PADDING, SYN, TWO_WORDS, WORD
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import OVER, UNANSWERED, State

quick = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)

Seen = tuple[int, bytes, bool] | Event


def frame(session: int, flags: int, payload: bytes = b"", value: int | None = None, *, long: bool = False) -> bytes:
    """A fragment made independently of the code under test, but for its constants."""
    field = len(payload) if value is None else value
    if long or field > FIELD:
        head = TWO_WORDS.pack(session << 24 | flags | LONG, field)
    else:
        head = WORD.pack(session << 24 | flags | field)
    return head + payload + PADDING[len(payload) & 3]


def seen(item: Item) -> Seen:
    return (item[0], bytes(item[1]), item[2]) if isinstance(item, tuple) else item


def hear(mux: Mux, octets: bytes) -> list[Seen]:
    return [seen(item) for item in mux.receive(octets)]


def merged(items: Iterable[Seen]) -> list[Seen]:
    """The same whatever the cuts: data of one session is joined up to its record mark."""
    out: list[Seen] = []
    for item in items:
        last = out[-1] if out else None
        if isinstance(item, tuple) and isinstance(last, tuple) and last[0] == item[0] and not last[2]:
            out[-1] = (item[0], last[1] + item[1], item[2])
        else:
            out.append(item)
    return out


def take(mux: Mux) -> bytes:
    octets = bytes(mux.outgoing)
    mux.outgoing.clear()
    return octets


def check_books(mux: Mux, mine: range) -> None:
    """Each id that the end may open is in a life or in one row of those to come; what it calls is not answered yet."""
    ids = mux._lives.ids
    waiting = [*ids._settled, *(sid for sid, _ in (*ids._finished, *ids._reset))]
    assert sorted([*waiting, *(sid for sid in mine if mux.state(sid) not in OVER)]) == list(mine)
    assert sorted(ids.calling) == [sid for sid in mine if mux.state(sid) in UNANSWERED]


class Pair:
    """An initiator and an acceptor; `settle` carries everything over until both are silent."""

    def __init__(self) -> None:
        self.initiator = Mux(initiator=True)
        self.acceptor = Mux(initiator=False)

    def __iter__(self) -> Iterator[Mux]:
        return iter((self.initiator, self.acceptor))

    def settle(self) -> list[Seen]:
        items: list[Seen] = []
        while self.initiator.outgoing or self.acceptor.outgoing:
            items += hear(self.acceptor, take(self.initiator))
            items += hear(self.initiator, take(self.acceptor))
        assert not [item for item in items if isinstance(item, Broken)]
        return items

    def opened(self, protocol: int = 80) -> int:
        """A session of the initiator, open both ways."""
        session = self.initiator.open(protocol)
        self.settle()
        self.acceptor.accept(session)
        self.settle()
        return session


def reach(state: State, *, ours: bool = True) -> tuple[Mux, int]:
    """An initiator with a session in `state`. `ours` chooses whose id it is where both are possible."""
    pair = Pair()
    us, peer = pair
    called = state in {State.SYN_RCVD, State.SYN_RCVD_FIN} or not ours
    caller, answerer = (peer, us) if called else (us, peer)
    session = caller.open(80) if state is not State.IDLE else 3 - ours
    if state is State.SYN_SENT_FIN or state is State.SYN_RCVD_FIN:
        caller.finish(session)
    if called or state not in UNANSWERED:
        pair.settle()
    if state in {State.OPEN, State.LOCAL_CLOSED, State.REMOTE_CLOSED}:
        answerer.accept(session)
        if state is not State.OPEN:
            (us if state is State.LOCAL_CLOSED else peer).finish(session)
        pair.settle()
    if state is State.WITHDRAWN or state is State.RESET:
        us.reset(session)
    if state is State.RESET and not called:
        hear(us, frame(session, SYN, value=80))
    take(us)
    assert us.state(session) is state
    return us, session
