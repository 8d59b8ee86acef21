"""The state table: complete, in agreement with the fast paths, and followed by a real `Mux` in every state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from tests.wire.webmux.helpers import check_ids, frame, reach, receive, take_output
from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.events import Broken
from tunneld.wire.webmux.header import FIN, PUSH, RST, SYN
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import OVER, RECEIVING, SENDING, TABLE, UNANSWERED, Party, Signal, State

STATES = list(State)
PAIRS = list(product(State, Signal))
SESSIONS = [(state, ours) for state in State for ours in (True, False) if ours or state not in UNANSWERED]
SEND: dict[Signal, Callable[[Mux, int], object]] = {
    Signal.SYN: lambda mux, session: mux.accept(session),
    Signal.DATA: lambda mux, session: mux.send(session, b"abcd"),
    Signal.FIN: lambda mux, session: mux.finish(session),
    Signal.RST: lambda mux, session: mux.reset(session),
}
FRAMES: dict[Signal, Callable[[int], bytes]] = {
    Signal.SYN: lambda session: frame(session, SYN, value=80),
    Signal.DATA: lambda session: frame(session, 0, b"abcd"),
    Signal.FIN: lambda session: frame(session, FIN),
    Signal.RST: lambda session: frame(session, RST),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_entered_and_left(state: State) -> None:
    assert any(after is state for (before, _, _), after in TABLE.items() if before is not state)
    assert any(after is not state for (before, _, _), after in TABLE.items() if before is state)


@pytest.mark.parametrize("state", STATES)
def test_a_reset_of_the_peer_is_always_possible_and_ends_the_session(state: State) -> None:
    assert TABLE[state, Party.PEER, Signal.RST] is State.IDLE
    assert ((state, Party.US, Signal.RST) in TABLE) is (state not in OVER | {State.WITHDRAWN})


@pytest.mark.parametrize(("state", "signal"), PAIRS)
def test_we_can_send_what_the_table_allows_and_nothing_else(state: State, signal: Signal) -> None:
    mux, session = reach(state)
    expected = TABLE.get((state, Party.US, signal))
    if signal is Signal.SYN and state in OVER:
        assert mux.state(mux.open(80)) is expected
    elif expected is not None:
        SEND[signal](mux, session)
        assert mux.state(session) is expected
        assert bool(take_output(mux)) is ((state, expected) != (State.SYN_SENT_FIN, State.WITHDRAWN))
    else:
        with pytest.raises(LocalProtocolError, match=f"session {session} "):
            SEND[signal](mux, session)
        assert mux.state(session) is state
        assert not mux.outgoing


@pytest.mark.parametrize(("state", "signal"), PAIRS)
def test_the_peer_can_send_what_the_table_allows_and_anything_else_breaks_the_session(
    state: State, signal: Signal
) -> None:
    mux, session = reach(state, ours=not (signal is Signal.SYN and state in OVER))
    expected = TABLE.get((state, Party.PEER, signal))
    items = receive(mux, FRAMES[signal](session))
    if expected is not None:
        assert mux.state(session) is expected
        assert take_output(mux) == (frame(session, RST) if (state, signal) == (State.WITHDRAWN, Signal.SYN) else b"")
        assert not any(isinstance(item, Broken) for item in items)
    else:
        assert mux.state(session) is State.RESET
        assert take_output(mux) == frame(session, RST)
        assert [type(item) for item in items] == [Broken]


@pytest.mark.parametrize(("first", "second"), list(product(Signal, Signal)))
@pytest.mark.parametrize(("state", "ours"), SESSIONS)
def test_every_id_stays_in_one_place_whatever_the_peer_sends(
    state: State, ours: bool, first: Signal, second: Signal
) -> None:
    """Two signals in a row, so that late ones are included: the first may end the session."""
    mux, session = reach(state, ours=ours)
    for signal in (first, second):
        receive(mux, FRAMES[signal](session))
        check_ids(mux, range(2, 256, 2))


@pytest.mark.parametrize(("state", "ours"), SESSIONS)
def test_every_id_stays_in_one_place_whatever_we_send(state: State, ours: bool) -> None:
    for signal in Signal:
        mux, session = reach(state, ours=ours)
        if (state, Party.US, signal) in TABLE and not (state in OVER and signal is Signal.SYN):
            SEND[signal](mux, session)
        check_ids(mux, range(2, 256, 2))


@pytest.mark.parametrize("flags", [SYN, SYN | PUSH, SYN | FIN, FIN, FIN | PUSH])
@pytest.mark.parametrize(("state", "ours"), SESSIONS)
def test_a_header_without_payload_means_the_same_on_the_fast_path(state: State, ours: bool, flags: int) -> None:
    """A complete header takes the fast path; a cut one does not."""
    fast, session = reach(state, ours=ours)
    slow, _ = reach(state, ours=ours)
    header = frame(session, flags, value=80 if flags & SYN else 0)
    slow_items = [item for byte in header for item in receive(slow, bytes([byte]))]
    assert receive(fast, header) == slow_items
    assert fast.outgoing == slow.outgoing
    assert fast.state(session) is slow.state(session)
    assert fast.credit(session) == slow.credit(session)
    assert fast.allowance(session) == slow.allowance(session)


@pytest.mark.parametrize(("state", "ours"), SESSIONS)
def test_the_fast_path_agrees_with_the_table(state: State, ours: bool) -> None:
    """Complete data frames do not use the table; cut ones do (their header is parsed byte by byte)."""
    fast, session = reach(state, ours=ours)
    slow, _ = reach(state, ours=ours)
    data = frame(session, 0, b"abcd")
    slow_items = [item for byte in data for item in receive(slow, bytes([byte]))]
    fast_items = receive(fast, data)
    delivered = b"".join(item[1] for item in fast_items if isinstance(item, tuple))
    assert delivered == b"".join(item[1] for item in slow_items if isinstance(item, tuple))
    assert [x for x in fast_items if not isinstance(x, tuple)] == [x for x in slow_items if not isinstance(x, tuple)]
    assert bool(delivered) is (state in RECEIVING)
    assert fast.outgoing == slow.outgoing
    assert fast.allowance(session) == slow.allowance(session)
    assert fast.state(session) is slow.state(session)


@pytest.mark.parametrize("state", STATES)
def test_both_paths_of_send_have_the_same_outcome(state: State) -> None:
    mux, session = reach(state)
    assert (mux.credit(session) > 0) is (state in SENDING)
    if state in SENDING:
        assert mux.send(session, b"abcd") == 4
        fast = take_output(mux)
        assert mux.send(session, memoryview(b"abcd"), finish=True) == 4
        assert take_output(mux) == frame(session, FIN, b"abcd")
        assert fast == frame(session, 0, b"abcd")
