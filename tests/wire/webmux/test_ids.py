"""Which id is opened next, and when none is free."""

from __future__ import annotations

import pytest

from tests.wire.webmux.helpers import Pair, frame, receive, take_output
from tunneld.wire.webmux.events import AtomInterned, Broken, CreditAdded, Opened
from tunneld.wire.webmux.header import CONTROL, FIN, RST, SYN, Code
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.sessions import NoFreeSessionError
from tunneld.wire.webmux.states import State

ALL = 127


def full() -> Mux:
    """An initiator with all of its sessions open."""
    mux = Mux(initiator=True)
    for session in [mux.open(80) for _ in range(ALL)]:
        receive(mux, frame(session, SYN, value=80))
    take_output(mux)
    return mux


def test_127_sessions_can_be_open() -> None:
    mux = full()
    assert (mux.live, mux.can_open) == (ALL, False)
    with pytest.raises(NoFreeSessionError, match="could not open a session"):
        mux.open(80)
    assert not mux.outgoing


@pytest.mark.parametrize(("initiator", "ids"), [(True, range(2, 256, 2)), (False, range(3, 256, 2))])
def test_ids_have_the_parity_of_the_role(initiator: bool, ids: range) -> None:
    mux = Mux(initiator=initiator)
    assert [mux.open(80) for _ in range(ALL)] == list(ids)


def test_an_id_is_free_only_when_both_directions_are_closed() -> None:
    mux = full()
    mux.finish(6)
    assert not mux.can_open
    receive(mux, frame(6, FIN))
    assert mux.open(80) == 6


def test_credit_that_is_late_after_both_fins_belongs_to_the_previous_generation() -> None:
    mux = full()
    mux.finish(6)
    receive(mux, frame(6, FIN))
    assert mux.open(80) == 6
    assert receive(mux, frame(6, CONTROL | Code.ADD_CREDIT << 19, value=9)) == []
    assert mux.credit(6) == 16384


def test_the_least_recently_used_id_is_opened_first() -> None:
    mux = full()
    for session in (8, 4, 6):
        receive(mux, frame(session, RST))
    assert [mux.open(80), mux.open(80), mux.open(80)] == [8, 4, 6]


def test_an_id_that_we_reset_waits_until_the_peer_has_seen_the_rst() -> None:
    mux = full()
    receive(mux, frame(2, RST))
    mux.reset(4)
    assert mux.open(80) == 2
    assert not mux.can_open
    with pytest.raises(NoFreeSessionError):
        mux.open(80)
    receive(mux, frame(4, 0, b"late") + frame(4, FIN) + frame(4, CONTROL | Code.ADD_CREDIT << 19, value=9))
    assert not mux.can_open
    receive(mux, frame(2, SYN, value=80))
    assert mux.open(80) == 4
    assert mux.credit(4) == 16384


def test_an_answer_to_an_older_syn_proves_nothing() -> None:
    mux = Mux(initiator=True)
    for _ in range(ALL - 2):
        mux.open(80)
    receive(mux, frame(4, SYN, value=80))
    mux.reset(4)
    last = [mux.open(80), mux.open(80)]
    receive(mux, frame(2, SYN, value=80))
    assert not mux.can_open
    receive(mux, frame(last[0], SYN, value=80))
    assert mux.can_open


def test_a_fault_before_the_answer_proves_nothing() -> None:
    mux = full()
    receive(mux, frame(2, RST))
    mux.reset(4)
    assert mux.open(80) == 2
    (broken,) = receive(mux, frame(2, 0, b"not answered yet"))
    assert isinstance(broken, Broken)
    assert mux.open(80) == 4
    assert receive(mux, frame(4, 0, b"late")) == []


def test_a_peer_sends_nothing_after_its_reset() -> None:
    mux = full()
    receive(mux, frame(6, RST))
    assert mux.open(80) == 6
    assert receive(mux, frame(6, CONTROL | Code.ADD_CREDIT << 19, value=9)) == [CreditAdded(6, 16393)]


def test_a_reset_of_the_peer_settles_an_id_that_we_reset() -> None:
    mux = full()
    receive(mux, frame(2, RST))
    mux.reset(4)
    mux.open(80)
    receive(mux, frame(4, RST))
    assert mux.open(80) == 4


def test_without_an_outstanding_answer_the_least_recently_reset_id_is_opened() -> None:
    mux = full()
    mux.reset(8)
    mux.reset(4)
    assert mux.open(80) == 8
    assert not mux.can_open  # the answer to this one will settle 4


def test_an_answer_that_settles_nothing_is_not_waited_for() -> None:
    mux = Mux(initiator=True)
    for session in [mux.open(80) for _ in range(ALL)][:-1]:
        receive(mux, frame(session, SYN, value=80))
    mux.reset(8)
    assert mux.open(80) == 8


def test_messages_before_the_answer_on_an_unsettled_id_belong_to_the_previous_generation() -> None:
    mux = full()
    mux.reset(8)
    assert mux.open(80) == 8
    take_output(mux)
    assert receive(mux, frame(8, 0, b"late") + frame(8, CONTROL | Code.ADD_CREDIT << 19, value=9)) == []
    receive(mux, frame(8, SYN, value=80))
    assert (mux.state(8), mux.credit(8)) == (State.OPEN, 16384)
    assert not mux.outgoing
    assert receive(mux, frame(8, CONTROL | Code.ADD_CREDIT << 19, value=9)) == [CreditAdded(8, 16393)]


def test_an_id_that_was_withdrawn_is_not_opened_before_the_answer() -> None:
    mux = Mux(initiator=True)
    for session in [mux.open(80) for _ in range(ALL)]:
        mux.reset(session)
    assert (mux.live, mux.can_open) == (ALL, False)
    receive(mux, frame(8, RST))
    assert mux.open(80) == 8


def test_a_fragment_cut_by_the_next_generation_belongs_to_the_previous_one() -> None:
    mux = full()
    last_data = frame(8, FIN, b"abcdefgh")
    assert receive(mux, last_data[:8]) == [(8, b"abcd", False)]
    mux.reset(8)
    assert mux.open(80) == 8
    assert receive(mux, last_data[8:]) == []
    assert mux.state(8) is State.SYN_SENT


def test_a_fragment_whose_session_broke_and_was_opened_again_is_ignored() -> None:
    mux = full()
    for item in mux.receive(frame(8, FIN, bytes(16385))):
        assert isinstance(item, Broken)
        assert mux.open(80) == 8
    assert mux.state(8) is State.SYN_SENT


def test_an_atom_that_is_being_received_does_not_belong_to_the_session_of_its_number() -> None:
    mux = Mux(initiator=True)
    atom = frame(2, CONTROL | Code.INTERN_ATOM << 19, b"urn:x:tunnel")
    assert receive(mux, atom[:9]) == []
    assert mux.open(80) == 2
    assert receive(mux, atom[9:]) == [AtomInterned(0x20002, "urn:x:tunnel")]


def test_ids_of_the_peer_may_be_reopened_at_once() -> None:
    pair = Pair()
    for _ in range(3):
        assert receive(pair.acceptor, frame(2, SYN, value=80)) == [Opened(2, 80)]
        pair.acceptor.reset(2)
