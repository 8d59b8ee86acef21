"""Two codecs joined in memory, and helpers to compare items."""

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
    """A fragment, packed independently of the code under test except for its constants."""
    field = len(payload) if value is None else value
    if long or field > FIELD:
        head = TWO_WORDS.pack(session << 24 | flags | LONG, field)
    else:
        head = WORD.pack(session << 24 | flags | field)
    return head + payload + PADDING[len(payload) & 3]


def seen(item: Item) -> Seen:
    return (item[0], bytes(item[1]), item[2]) if isinstance(item, tuple) else item


def receive(mux: Mux, data: bytes) -> list[Seen]:
    return [seen(item) for item in mux.receive(data)]


def merged(items: Iterable[Seen]) -> list[Seen]:
    """Items independent of how the input was cut: consecutive data of one session is joined up to its record end."""
    out: list[Seen] = []
    for item in items:
        last = out[-1] if out else None
        if isinstance(item, tuple) and isinstance(last, tuple) and last[0] == item[0] and not last[2]:
            out[-1] = (item[0], last[1] + item[1], item[2])
        else:
            out.append(item)
    return out


def take_output(mux: Mux) -> bytes:
    data = bytes(mux.outgoing)
    mux.outgoing.clear()
    return data


def check_ids(mux: Mux, ours: range) -> None:
    """Each id of this end is either in use or in exactly one queue of free ids, and the unanswered ids match."""
    ids = mux.table.ids
    assert sorted([*ids.waiting, *(sid for sid in ours if mux.state(sid) not in OVER)]) == list(ours)
    assert sorted(ids.unanswered) == [sid for sid in ours if mux.state(sid) in UNANSWERED]


class Pair:
    """An initiator and an acceptor; `settle` delivers all output until neither has any."""

    def __init__(self) -> None:
        self.initiator = Mux(initiator=True)
        self.acceptor = Mux(initiator=False)

    def __iter__(self) -> Iterator[Mux]:
        return iter((self.initiator, self.acceptor))

    def settle(self) -> list[Seen]:
        items: list[Seen] = []
        while self.initiator.outgoing or self.acceptor.outgoing:
            items += receive(self.acceptor, take_output(self.initiator))
            items += receive(self.initiator, take_output(self.acceptor))
        assert not [item for item in items if isinstance(item, Broken)]
        return items

    def opened(self, protocol: int = 80) -> int:
        """A session of the initiator, open in both directions."""
        session = self.initiator.open(protocol)
        self.settle()
        self.acceptor.accept(session)
        self.settle()
        return session


def reach(state: State, *, ours: bool = True) -> tuple[Mux, int]:
    """An initiator with a session in `state`; `ours` is whether the id is its own, if both are possible."""
    pair = Pair()
    us, peer = pair
    incoming = state in {State.SYN_RCVD, State.SYN_RCVD_FIN} or not ours
    opener, acceptor = (peer, us) if incoming else (us, peer)
    session = opener.open(80) if state is not State.IDLE else 3 - ours
    if state is State.SYN_SENT_FIN or state is State.SYN_RCVD_FIN:
        opener.finish(session)
    if incoming or state not in UNANSWERED:
        pair.settle()
    if state in {State.OPEN, State.LOCAL_CLOSED, State.REMOTE_CLOSED}:
        acceptor.accept(session)
        if state is not State.OPEN:
            (us if state is State.LOCAL_CLOSED else peer).finish(session)
        pair.settle()
    if state is State.WITHDRAWN or state is State.RESET:
        us.reset(session)
    if state is State.RESET and not incoming:
        receive(us, frame(session, SYN, value=80))
    take_output(us)
    assert us.state(session) is state
    return us, session
