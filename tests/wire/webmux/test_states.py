"""The table: total, true of the code beside it, and kept by a real `Mux` in every state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from tests.wire.webmux.helpers import check_books, frame, hear, reach, take
from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.events import Broken
from tunneld.wire.webmux.header import FIN, PUSH, RST, SYN
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import OVER, RECEIVING, SENDING, TABLE, UNANSWERED, Said, State, Who

STATES = list(State)
PAIRS = list(product(State, Said))
LIVES = [(state, ours) for state in State for ours in (True, False) if ours or state not in UNANSWERED]
SAYS: dict[Said, Callable[[Mux, int], object]] = {
    Said.SYN: lambda mux, session: mux.accept(session),
    Said.DATA: lambda mux, session: mux.send(session, b"abcd"),
    Said.FIN: lambda mux, session: mux.finish(session),
    Said.RST: lambda mux, session: mux.reset(session),
}
FRAMES: dict[Said, Callable[[int], bytes]] = {
    Said.SYN: lambda session: frame(session, SYN, value=80),
    Said.DATA: lambda session: frame(session, 0, b"abcd"),
    Said.FIN: lambda session: frame(session, FIN),
    Said.RST: lambda session: frame(session, RST),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_reached_and_left(state: State) -> None:
    assert any(now is state for (before, _, _), now in TABLE.items() if before is not state)
    assert any(now is not state for (before, _, _), now in TABLE.items() if before is state)


@pytest.mark.parametrize("state", STATES)
def test_a_reset_of_the_peer_is_always_possible_and_ends_the_session(state: State) -> None:
    assert TABLE[state, Who.PEER, Said.RST] is State.IDLE
    assert ((state, Who.US, Said.RST) in TABLE) is (state not in OVER | {State.WITHDRAWN})


@pytest.mark.parametrize(("state", "said"), PAIRS)
def test_we_say_what_the_table_has_and_nothing_else(state: State, said: Said) -> None:
    mux, session = reach(state)
    expected = TABLE.get((state, Who.US, said))
    if said is Said.SYN and state in OVER:
        assert mux.state(mux.open(80)) is expected
    elif expected is not None:
        SAYS[said](mux, session)
        assert mux.state(session) is expected
        assert bool(take(mux)) is ((state, expected) != (State.SYN_SENT_FIN, State.WITHDRAWN))
    else:
        with pytest.raises(LocalProtocolError, match=f"session {session} "):
            SAYS[said](mux, session)
        assert mux.state(session) is state
        assert not mux.outgoing


@pytest.mark.parametrize(("state", "said"), PAIRS)
def test_the_peer_says_what_the_table_has_and_pays_for_the_rest(state: State, said: Said) -> None:
    mux, session = reach(state, ours=not (said is Said.SYN and state in OVER))
    expected = TABLE.get((state, Who.PEER, said))
    heard = hear(mux, FRAMES[said](session))
    if expected is not None:
        assert mux.state(session) is expected
        assert take(mux) == (frame(session, RST) if (state, said) == (State.WITHDRAWN, Said.SYN) else b"")
        assert not any(isinstance(item, Broken) for item in heard)
    else:
        assert mux.state(session) is State.RESET
        assert take(mux) == frame(session, RST)
        assert [type(item) for item in heard] == [Broken]


@pytest.mark.parametrize(("first", "second"), list(product(Said, Said)))
@pytest.mark.parametrize(("state", "ours"), LIVES)
def test_every_id_stays_in_one_place_whatever_the_peer_says(
    state: State, ours: bool, first: Said, second: Said
) -> None:
    """Late words too: two in a row, since the first may end the life."""
    mux, session = reach(state, ours=ours)
    for said in (first, second):
        hear(mux, FRAMES[said](session))
        check_books(mux, range(2, 256, 2))


@pytest.mark.parametrize(("state", "ours"), LIVES)
def test_every_id_stays_in_one_place_whatever_we_say(state: State, ours: bool) -> None:
    for said in Said:
        mux, session = reach(state, ours=ours)
        if (state, Who.US, said) in TABLE and not (state in OVER and said is Said.SYN):
            SAYS[said](mux, session)
        check_books(mux, range(2, 256, 2))


@pytest.mark.parametrize("flags", [SYN, SYN | PUSH, SYN | FIN, FIN, FIN | PUSH])
@pytest.mark.parametrize(("state", "ours"), LIVES)
def test_a_header_with_nothing_behind_it_says_the_same_on_its_straight_path(
    state: State, ours: bool, flags: int
) -> None:
    """Whole, it goes down that path; cut, it does not."""
    straight, session = reach(state, ours=ours)
    careful, _ = reach(state, ours=ours)
    header = frame(session, flags, value=80 if flags & SYN else 0)
    careful_items = [item for octet in header for item in hear(careful, bytes([octet]))]
    assert hear(straight, header) == careful_items
    assert straight.outgoing == careful.outgoing
    assert straight.state(session) is careful.state(session)
    assert straight.credit(session) == careful.credit(session)
    assert straight.allowance(session) == careful.allowance(session)


@pytest.mark.parametrize(("state", "ours"), LIVES)
def test_the_straight_path_agrees_with_the_table(state: State, ours: bool) -> None:
    """Whole data frames do not look at the table; cut ones do (their header is read octet by octet)."""
    straight, session = reach(state, ours=ours)
    careful, _ = reach(state, ours=ours)
    data = frame(session, 0, b"abcd")
    careful_items = [item for octet in data for item in hear(careful, bytes([octet]))]
    straight_items = hear(straight, data)
    delivered = b"".join(item[1] for item in straight_items if isinstance(item, tuple))
    assert delivered == b"".join(item[1] for item in careful_items if isinstance(item, tuple))
    assert [x for x in straight_items if not isinstance(x, tuple)] == [
        x for x in careful_items if not isinstance(x, tuple)
    ]
    assert bool(delivered) is (state in RECEIVING)
    assert straight.outgoing == careful.outgoing
    assert straight.allowance(session) == careful.allowance(session)
    assert straight.state(session) is careful.state(session)


@pytest.mark.parametrize("state", STATES)
def test_sending_takes_one_path_or_the_other_with_the_same_outcome(state: State) -> None:
    mux, session = reach(state)
    assert (mux.credit(session) > 0) is (state in SENDING)
    if state in SENDING:
        assert mux.send(session, b"abcd") == 4
        straight = take(mux)
        assert mux.send(session, memoryview(b"abcd"), finish=True) == 4
        assert take(mux) == frame(session, FIN, b"abcd")
        assert straight == frame(session, 0, b"abcd")
