"""Messages of the peer, and the cost of its faults."""

from __future__ import annotations

import pytest

from tests.wire.webmux.helpers import Pair, frame, merged, reach, receive, seen, take_output
from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.webmux.events import Accepted, Broken, Finished, Opened, Reset, SessionRefused
from tunneld.wire.webmux.header import (
    CONTROL,
    FIN,
    MAX_STRAY_SYNS,
    MAX_TEXT,
    MAX_UNSENT,
    PUSH,
    RST,
    SYN,
    UNLIMITED,
    Code,
)
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import State


def test_payload_is_a_slice_of_the_input() -> None:
    mux, session = reach(State.OPEN)
    memory = bytearray(frame(session, 0, b"abcd"))
    ((_, payload, _),) = [item for item in mux.receive(memory) if isinstance(item, tuple)]
    memory[4:8] = b"ABCD"
    assert bytes(payload) == b"ABCD"


def test_a_fragment_is_handed_out_while_it_arrives() -> None:
    mux, session = reach(State.OPEN)
    data = frame(session, PUSH, b"hello")
    assert receive(mux, data[:6]) == [(session, b"he", False)]
    assert receive(mux, data[6:9]) == [(session, b"llo", True)]
    assert receive(mux, data[9:] + frame(session, 0, b"x")) == [(session, b"x", False)]


def test_padding_may_have_any_value() -> None:
    mux, session = reach(State.OPEN)
    assert receive(mux, frame(session, 0, b"a")[:5] + b"\xff\xfe\xfd" + frame(session, FIN)) == [
        (session, b"a", False),
        Finished(session),
    ]


def test_an_empty_record_is_reported_and_an_empty_fragment_is_not() -> None:
    mux, session = reach(State.OPEN)
    assert receive(mux, frame(session, PUSH) + frame(session, 0)) == [(session, b"", True)]


def test_a_data_fragment_may_have_a_long_length() -> None:
    mux, session = reach(State.OPEN)
    mux.grant(session, UNLIMITED)
    take_output(mux)
    large = bytes(300_001)
    data = frame(session, 0, b"small", long=True) + frame(session, PUSH | FIN, large)
    assert merged(receive(mux, data)) == [(session, b"small" + large, True), Finished(session)]


def test_syn_with_long_has_its_protocol_id_in_the_long_word() -> None:
    mux = Mux(initiator=False)
    assert receive(mux, frame(2, SYN, value=0x30001, long=True)) == [Opened(2, 0x30001)]
    mux.accept(2)
    assert take_output(mux) == frame(2, SYN, value=0x30001)


def test_syn_with_fin_opens_and_closes_at_once() -> None:
    mux = Mux(initiator=False)
    assert receive(mux, frame(2, SYN | FIN, value=80)) == [Opened(2, 80), Finished(2)]
    assert mux.state(2) is State.SYN_RCVD_FIN


def test_an_answer_with_fin_accepts_and_finishes() -> None:
    mux, session = reach(State.SYN_SENT)
    assert receive(mux, frame(session, SYN | FIN, value=80)) == [Accepted(session), Finished(session)]


def test_fin_with_syn_is_not_reported_if_the_caller_refused_the_session_in_between() -> None:
    mux = Mux(initiator=False)
    received = []
    for item in mux.receive(frame(2, SYN | FIN, value=80)):
        received.append(item)
        mux.reset(2)
    assert received == [Opened(2, 80)]


def test_rst_with_anything_is_rst() -> None:
    mux, session = reach(State.OPEN)
    assert receive(mux, frame(session, RST | FIN | PUSH, b"urn:e\0gone\0")) == [Reset(session, "urn:e", "gone")]
    mux, session = reach(State.SYN_SENT)
    assert receive(mux, frame(session, RST | SYN, value=80)) == [SessionRefused(session, "", "")]


def test_a_reason_may_be_cut_anywhere_and_is_truncated_at_the_limit() -> None:
    mux, session = reach(State.SYN_SENT)
    long = b"urn:e\0" + bytes([0xC3]) + b"x" * 70_000
    items = receive(mux, frame(session, RST, long)[:900]) + receive(mux, frame(session, RST, long)[900:])
    (refused,) = items
    assert isinstance(refused, SessionRefused)
    assert refused.text.startswith("\ufffdx")
    assert len(refused.text) == MAX_TEXT - len("urn:e\0")


def test_data_of_a_session_reset_by_the_caller_while_it_arrives_is_dropped() -> None:
    mux, session = reach(State.OPEN)
    data = frame(session, FIN, b"abcdefgh") + frame(session, 0, b"late") + frame(session, FIN)
    received = []
    for item in mux.receive(data[:8]):
        received.append(item)
        mux.reset(session)
    assert [type(item) for item in received] == [tuple]
    assert receive(mux, data[8:]) == []
    assert take_output(mux) == frame(session, RST)


def test_a_refusal_is_applied_even_if_the_caller_resets_the_session_while_the_reason_arrives() -> None:
    mux, session = reach(State.SYN_SENT)
    refusal = frame(session, RST, b"\0not served\0")
    assert receive(mux, refusal[:9]) == []
    mux.reset(session)
    assert receive(mux, refusal[9:]) == []
    assert (mux.live, mux.state(session)) == (0, State.IDLE)


def test_an_answer_by_fin_does_not_finish_a_session_that_was_reset_in_between() -> None:
    mux, session = reach(State.SYN_SENT)
    received = []
    for item in mux.receive(frame(session, FIN)):
        received.append(item)
        mux.reset(session)
    assert received == [Accepted(session)]
    assert (mux.live, mux.state(session)) == (0, State.RESET)


def test_an_answer_by_syn_and_fin_does_not_end_a_session_opened_and_withdrawn_in_between() -> None:
    mux = Mux(initiator=True)
    for session in [mux.open(80) for _ in range(127)][:-1]:
        receive(mux, frame(session, SYN, value=80))
    for item in mux.receive(frame(254, FIN)):
        assert item == Accepted(254)
        mux.reset(254)
        assert mux.open(80) == 254
        mux.reset(254)
    assert mux.state(254) is State.WITHDRAWN


def test_after_our_reset_late_messages_are_ignored_until_the_next_syn() -> None:
    mux = Mux(initiator=False)
    receive(mux, frame(2, SYN, value=80))
    mux.reset(2)
    take_output(mux)
    assert receive(mux, frame(2, 0, b"late") + frame(2, FIN) + frame(2, SYN, value=81)) == [Opened(2, 81)]
    assert not mux.outgoing


def test_a_withdrawn_session_is_reset_when_the_answer_arrives() -> None:
    mux, session = reach(State.SYN_SENT)
    mux.reset(session)
    assert take_output(mux) == frame(session, FIN)
    assert receive(mux, frame(session, SYN, value=80) + frame(session, 0, b"x") + frame(session, FIN)) == []
    assert take_output(mux) == frame(session, RST)
    assert mux.state(session) is State.RESET


@pytest.mark.parametrize("flag", [FIN, RST])
def test_a_withdrawn_session_is_over_when_the_answer_ends_it(flag: int) -> None:
    mux, session = reach(State.SYN_SENT_FIN)
    mux.reset(session)
    assert receive(mux, frame(session, flag)) == []
    assert not mux.outgoing
    assert (mux.live, mux.state(session)) == (0, State.IDLE)


def test_data_on_an_idle_session_is_answered_once() -> None:
    mux = Mux(initiator=False)
    items = receive(mux, 100 * frame(2, 0, b"abcd"))
    assert [type(item) for item in items] == [Broken]
    assert take_output(mux) == frame(2, RST)


def test_syns_of_wrong_parity_are_answered_by_rst_until_there_are_too_many() -> None:
    mux = Mux(initiator=False)
    assert [type(item) for item in receive(mux, MAX_STRAY_SYNS * frame(3, SYN, value=80))] == [Broken] * MAX_STRAY_SYNS
    assert take_output(mux) == MAX_STRAY_SYNS * frame(3, RST)
    with pytest.raises(RemoteProtocolError, match="that the peer may not open, such as 5"):
        receive(mux, frame(5, SYN, value=80))
    with pytest.raises(LocalProtocolError, match="after an error"):
        mux.receive(b"")


def test_a_syn_on_an_id_of_ours_that_was_in_use_may_be_late_and_is_not_counted() -> None:
    mux, session = reach(State.REMOTE_CLOSED)
    mux.finish(session)
    take_output(mux)
    assert len(receive(mux, 2 * MAX_STRAY_SYNS * frame(session, SYN, value=80))) == 2 * MAX_STRAY_SYNS
    assert take_output(mux) == 2 * MAX_STRAY_SYNS * frame(session, RST)


@pytest.mark.parametrize("session", [0, 1])
def test_reserved_sessions_are_skipped_but_cannot_be_opened(session: int) -> None:
    mux = Mux(initiator=True)
    ignored = frame(session, 0, b"data") + frame(session, FIN | PUSH, b"x") + frame(session, RST, b"y")
    assert receive(mux, ignored + frame(session, CONTROL | Code.ADD_CREDIT << 19, value=5)) == []
    assert not mux.outgoing
    assert [type(item) for item in receive(mux, frame(session, SYN, value=80))] == [Broken]
    assert take_output(mux) == frame(session, RST)


def test_a_peer_that_causes_answers_and_does_not_read_is_an_error() -> None:
    mux = Mux(initiator=False)
    mux.outgoing += bytes(MAX_UNSENT)
    assert receive(mux, frame(2, SYN, value=80)) == [Opened(2, 80)]
    mux.reset(2)
    with pytest.raises(RemoteProtocolError, match="sends but does not read"):
        receive(mux, frame(2, SYN, value=80))


def test_input_must_be_iterated_to_its_end() -> None:
    mux = Mux(initiator=False)
    next(mux.receive(frame(2, SYN, value=80)))
    with pytest.raises(LocalProtocolError, match="before the last input was iterated"):
        mux.receive(b"")


def test_no_more_fragments_are_parsed_at_once_than_the_caller_allows() -> None:
    mux = Mux(initiator=False)
    data = frame(2, SYN, value=80) + frame(2, 0, b"hello") * 3 + b"\x02"
    turns = [([seen(item) for item in mux.receive(data, 2)], mux.has_unparsed)]
    with pytest.raises(LocalProtocolError, match="before the rest of the last input"):
        mux.receive(b"more", 2)
    turns.append(([seen(item) for item in mux.receive(b"", 2)], mux.has_unparsed))
    hello = (2, b"hello", False)
    assert turns == [([Opened(2, 80), hello], True), ([hello, hello], False)]
    assert receive(mux, frame(2, FIN)[1:]) == [Finished(2)]


def test_half_close_leaves_the_other_direction_alone() -> None:
    pair = Pair()
    session = pair.opened()
    pair.initiator.send(session, b"request", finish=True)
    assert pair.settle() == [(session, b"request", False), Finished(session)]
    assert pair.acceptor.send(session, b"response") == 8
    assert pair.settle() == [(session, b"response", False)]
    pair.acceptor.finish(session)
    assert pair.settle() == [Finished(session)]
    assert (pair.initiator.live, pair.acceptor.live) == (0, 0)
