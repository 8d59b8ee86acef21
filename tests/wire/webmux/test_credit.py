"""Credit: both ends count alike, whatever messages cross on the wire."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.wire.webmux.helpers import Pair, frame, reach, receive, take_output
from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.events import Broken, CreditAdded, DefaultCreditSet
from tunneld.wire.webmux.header import CONTROL, DEFAULT_CREDIT, FIN, RST, SYN, UNLIMITED, Code, pack_control
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import State


def agreed(pair: Pair, session: int) -> int:
    """The credit of the initiator, after a check that both ends agree on it."""
    assert pair.initiator.credit(session) == pair.acceptor.allowance(session)
    return pair.initiator.credit(session)


def test_credit_starts_at_16384_bytes_in_both_directions() -> None:
    pair = Pair()
    session = pair.opened()
    assert agreed(pair, session) == DEFAULT_CREDIT == 16384
    assert pair.acceptor.credit(session) == pair.initiator.allowance(session) == 16384


def test_only_payload_uses_credit_not_padding_and_headers() -> None:
    pair = Pair()
    session = pair.opened()
    pair.initiator.send(session, b"hello")
    pair.settle()
    assert agreed(pair, session) == DEFAULT_CREDIT - 5


def test_grants_are_reported_and_add_up() -> None:
    pair = Pair()
    session = pair.opened()
    pair.initiator.send(session, bytes(DEFAULT_CREDIT))
    pair.settle()
    pair.acceptor.grant(session, 100_000)
    pair.acceptor.grant(session, 300_000)
    assert pair.settle() == [CreditAdded(session, 100_000), CreditAdded(session, 400_000)]
    assert agreed(pair, session) == 400_000


def test_unlimited_stays_unlimited() -> None:
    pair = Pair()
    session = pair.opened()
    pair.acceptor.grant(session, UNLIMITED)
    pair.acceptor.grant(session, 1000)
    pair.settle()
    assert agreed(pair, session) == UNLIMITED + DEFAULT_CREDIT + 1000
    assert pair.initiator.send(session, bytes(5_000_000)) == 5_000_000
    pair.settle()
    assert agreed(pair, session) == UNLIMITED + DEFAULT_CREDIT + 1000 - 5_000_000


def test_a_peer_that_exceeds_its_credit_loses_the_session() -> None:
    mux, session = reach(State.OPEN)
    exact = frame(session, 0, bytes(DEFAULT_CREDIT))
    assert len(receive(mux, exact)) == 1
    (broken,) = receive(mux, frame(session, FIN, b"x"))
    assert broken == Broken(session, "data of 1 bytes exceeds its credit of 0")
    assert take_output(mux) == frame(session, RST)


def test_a_fragment_beyond_the_credit_is_refused_at_its_header() -> None:
    mux, session = reach(State.OPEN)
    items = receive(mux, frame(session, 0, bytes(DEFAULT_CREDIT + 1))[:100])
    assert [type(item) for item in items] == [Broken]


def test_the_default_is_for_future_sessions() -> None:
    pair = Pair()
    old = pair.opened()
    pair.acceptor.set_default_credit(1 << 20)
    assert pair.settle() == [DefaultCreditSet(1 << 20)]
    assert agreed(pair, old) == DEFAULT_CREDIT
    assert agreed(pair, pair.opened()) == 1 << 20


def test_a_default_that_crosses_a_syn_counts_at_both_ends() -> None:
    pair = Pair()
    session = pair.initiator.open(80)
    pair.initiator.send(session, bytes(1000))
    pair.acceptor.set_default_credit(20_000)
    assert CreditAdded(session, 19_000) in pair.settle()
    assert agreed(pair, session) == 19_000
    pair.acceptor.set_default_credit(30_000)
    pair.settle()
    assert agreed(pair, session) == 29_000
    pair.acceptor.accept(session)
    pair.acceptor.set_default_credit(40_000)
    pair.settle()
    assert agreed(pair, session) == 29_000


def test_a_flood_of_defaults_touches_every_unanswered_session_once_per_input() -> None:
    mux = Mux(initiator=True)
    opened = [mux.open(80) for _ in range(100)]
    flood = b"".join(pack_control(Code.SET_DEFAULT_CREDIT, 0, DEFAULT_CREDIT + more) for more in range(1, 1001))
    added = [item for item in receive(mux, flood) if isinstance(item, CreditAdded)]
    assert added == [CreditAdded(session, DEFAULT_CREDIT + 1000) for session in opened]
    assert mux.cost == 1 + 1000 + 100


def test_a_default_counts_for_the_answer_behind_it_and_not_for_the_one_before() -> None:
    mux = Mux(initiator=True)
    before, behind = mux.open(80), mux.open(80)
    raised = pack_control(Code.SET_DEFAULT_CREDIT, 0, DEFAULT_CREDIT + 1)
    items = receive(mux, frame(before, SYN, value=80) + raised + frame(behind, SYN, value=80))
    assert [item for item in items if isinstance(item, CreditAdded)] == [CreditAdded(behind, DEFAULT_CREDIT + 1)]
    assert (mux.credit(before), mux.credit(behind)) == (DEFAULT_CREDIT, DEFAULT_CREDIT + 1)


def test_a_default_does_not_apply_to_a_session_that_its_sender_opened_before() -> None:
    pair = Pair()
    session = pair.initiator.open(80)
    pair.initiator.set_default_credit(20_000)
    pair.settle()
    pair.acceptor.accept(session)
    pair.settle()
    assert pair.acceptor.credit(session) == pair.initiator.allowance(session) == DEFAULT_CREDIT


def test_our_default_cannot_fall() -> None:
    mux = Mux(initiator=True)
    with pytest.raises(LocalProtocolError, match="default credit cannot fall from 16384 to 16383 bytes"):
        mux.set_default_credit(16383)
    assert not mux.outgoing


def test_a_peer_may_lower_its_default() -> None:
    mux = Mux(initiator=True)
    session = mux.open(80)
    mux.send(session, bytes(100))
    receive(mux, frame(0, CONTROL | Code.SET_DEFAULT_CREDIT << 19, value=10))
    assert mux.credit(session) == 0
    assert mux.send(session, b"x") == 0
    assert mux.credit(mux.open(80)) == 10


def test_credit_before_the_first_syn_is_added_to_the_default() -> None:
    pair = Pair()
    pair.acceptor.grant(2, 1000)
    pair.settle()
    session = pair.opened()
    assert agreed(pair, session) == DEFAULT_CREDIT + 1000


@pytest.mark.parametrize("flag", [FIN, RST])
def test_credit_before_the_first_syn_survives_a_fin_or_rst_on_the_idle_id(flag: int) -> None:
    mux = Mux(initiator=True)
    receive(mux, frame(2, CONTROL | Code.ADD_CREDIT << 19, value=1000) + frame(2, flag))
    assert mux.credit(mux.open(80)) == DEFAULT_CREDIT + 1000


def test_late_credit_does_not_count_for_the_next_generation() -> None:
    pair = Pair()
    session = pair.opened()
    pair.acceptor.finish(session)
    pair.settle()
    pair.initiator.send(session, bytes(1000), finish=True)
    pair.acceptor.grant(session, 1000)
    pair.settle()
    assert pair.initiator.state(session) is State.IDLE
    for _ in range(126):
        pair.initiator.finish(pair.opened())
    assert pair.opened() == session
    assert agreed(pair, session) == DEFAULT_CREDIT


@pytest.mark.parametrize("answer", [Mux.accept, Mux.finish])
def test_credit_granted_before_our_answer_is_sent_after_it(answer: Callable[[Mux, int], None]) -> None:
    mux, session = reach(State.SYN_RCVD)
    mux.grant(session, 1000)
    mux.grant(session, 2000)
    assert (mux.allowance(session), bytes(mux.outgoing)) == (DEFAULT_CREDIT, b"")
    answer(mux, session)
    assert mux.allowance(session) == DEFAULT_CREDIT + 3000
    assert take_output(mux)[4:] == frame(session, CONTROL | Code.ADD_CREDIT << 19, value=3000)


def test_credit_pending_for_an_answer_that_was_never_sent_does_not_count_for_the_next_generation() -> None:
    mux, session = reach(State.SYN_RCVD)
    mux.grant(session, 1000)
    mux.reset(session)
    receive(mux, frame(session, SYN, value=80))
    mux.accept(session)
    assert mux.allowance(session) == DEFAULT_CREDIT


def test_granting_after_the_peers_fin_sends_nothing() -> None:
    mux, session = reach(State.REMOTE_CLOSED)
    mux.grant(session, 1000)
    assert not mux.outgoing


def test_a_session_that_is_over_cannot_be_granted_credit() -> None:
    for mux, session in (reach(State.RESET), (Mux(initiator=True), 0)):
        with pytest.raises(LocalProtocolError, match="cannot be granted credit"):
            mux.grant(session, 1000)
