"""Our messages, byte by byte, and what the codec refuses to send."""

from __future__ import annotations

import pytest

from tests.wire.webmux.helpers import Pair, frame, merged, reach, receive, take_output
from tunneld.errors import LocalProtocolError
from tunneld.wire.webmux.events import Accepted, Finished, Opened, Reset, SessionRefused
from tunneld.wire.webmux.header import (
    CONTROL,
    FIN,
    MAX_FRAGMENT,
    MAX_FRAGMENTS,
    MAX_TEXT,
    PUSH,
    RST,
    SYN,
    UNLIMITED,
    Code,
)
from tunneld.wire.webmux.mux import Mux
from tunneld.wire.webmux.states import State


def limited(mss: int) -> tuple[Mux, int]:
    mux, session = reach(State.OPEN)
    receive(mux, frame(0, CONTROL | Code.SET_MSS << 19, value=mss))
    return mux, session


def test_fragments_obey_the_mss_and_only_the_last_has_flags() -> None:
    mux, session = limited(4)
    assert mux.send(session, b"abcdefghij", push=True, finish=True) == 10
    assert take_output(mux) == frame(session, 0, b"abcd") + frame(session, 0, b"efgh") + frame(
        session, PUSH | FIN, b"ij"
    )
    assert mux.state(session) is State.LOCAL_CLOSED


def test_a_tiny_mss_makes_a_send_short_not_slow() -> None:
    mux, session = limited(1)
    assert mux.send(session, bytes(10_000), push=True, finish=True) == MAX_FRAGMENTS
    assert take_output(mux) == MAX_FRAGMENTS * frame(session, 0, b"\0")
    assert mux.state(session) is State.OPEN


def test_an_mss_of_0_is_no_limit() -> None:
    mux, session = limited(4)
    receive(mux, frame(0, CONTROL | Code.SET_MSS << 19, value=0))
    mux.send(session, b"abcdefgh")
    assert take_output(mux) == frame(session, 0, b"abcdefgh")


def test_large_data_is_split_so_that_neither_a_long_length_nor_padding_is_needed() -> None:
    mux, session = reach(State.OPEN)
    receive(mux, frame(session, CONTROL | Code.ADD_CREDIT << 19, value=0))
    assert mux.send(session, bytes(MAX_FRAGMENT + 1)) == MAX_FRAGMENT + 1
    assert take_output(mux) == frame(session, 0, bytes(MAX_FRAGMENT)) + frame(session, 0, b"\0")


def test_credit_stops_data_but_neither_fin_nor_control() -> None:
    mux, session = reach(State.OPEN)
    assert mux.send(session, bytes(16385), push=True, finish=True) == 16384
    assert mux.send(session, b"x") == 0
    assert (mux.credit(session), mux.state(session)) == (0, State.OPEN)
    assert take_output(mux) == frame(session, 0, bytes(16384))
    assert mux.send(session, b"", push=True) == 0
    mux.grant(session, 5)
    mux.finish(session)
    assert take_output(mux) == frame(session, PUSH) + frame(session, CONTROL | Code.ADD_CREDIT << 19, value=5) + frame(
        session, FIN
    )


def test_sending_no_data_writes_nothing() -> None:
    mux, session = reach(State.OPEN)
    assert mux.send(session, b"") == 0
    assert not mux.outgoing


def test_data_may_follow_our_syn_at_once() -> None:
    pair = Pair()
    session = pair.initiator.open(80)
    pair.initiator.send(session, b"request", finish=True)
    assert pair.settle() == [Opened(session, 80), (session, b"request", False), Finished(session)]
    pair.acceptor.accept(session)
    pair.acceptor.send(session, b"response", finish=True)
    assert pair.settle() == [Accepted(session), (session, b"response", False), Finished(session)]
    assert (pair.initiator.live, pair.acceptor.live) == (0, 0)


def test_a_reason_is_encoded_as_in_the_draft() -> None:
    mux, session = reach(State.SYN_RCVD)
    mux.reset(session, "urn:no-such-protocol", "not\0served")
    assert take_output(mux) == frame(session, RST, b"urn:no-such-protocol\0not served\0")


def test_a_long_reason_is_truncated_between_characters() -> None:
    pair = Pair()
    session = pair.initiator.open(80)
    pair.settle()
    pair.acceptor.reset(session, text="\u00e9" * MAX_TEXT)
    (refused,) = pair.settle()
    assert isinstance(refused, SessionRefused)
    assert refused.text == "\u00e9" * ((MAX_TEXT - 2) // 2)


def test_a_reset_reaches_the_peer_with_its_reason() -> None:
    pair = Pair()
    session = pair.opened()
    pair.acceptor.reset(session, text="visitor left")
    assert pair.settle() == [Reset(session, "", "visitor left")]


def test_both_sides_open_sessions_of_their_own_parity() -> None:
    pair = Pair()
    assert [pair.initiator.open(1), pair.initiator.open(1)] == [2, 4]
    assert [pair.acceptor.open(1), pair.acceptor.open(1)] == [3, 5]
    assert pair.settle() == [Opened(2, 1), Opened(4, 1), Opened(3, 1), Opened(5, 1)]


@pytest.mark.parametrize("protocol", [-1, 0x40000])
def test_only_protocol_ids_can_be_opened(protocol: int) -> None:
    mux = Mux(initiator=True)
    with pytest.raises(LocalProtocolError, match="protocol id"):
        mux.open(protocol)
    assert mux.live == 0


def test_only_atoms_that_one_of_the_two_sides_interned_can_be_opened() -> None:
    mux = Mux(initiator=True)
    with pytest.raises(LocalProtocolError, match="atom 0x20000 was not interned by us"):
        mux.open(0x20000)
    receive(mux, frame(0, CONTROL, b"urn:theirs"))
    assert mux.open(0x20000) == 2
    assert mux.intern_atom(1, "urn:ours") == 0x20001
    assert mux.open(0x20001) == 4


def test_only_our_own_atoms_can_be_defined_as_endpoints() -> None:
    mux = Mux(initiator=True)
    receive(mux, frame(0, CONTROL, b"urn:theirs"))
    with pytest.raises(LocalProtocolError, match="atom 0x20000 was not interned by us"):
        mux.define_endpoint(0x20000)
    assert mux.intern_atom(0, "urn:ours") == 0x20000
    mux.define_endpoint(0x20000)


@pytest.mark.parametrize(("index", "text"), [(256, "a"), (-1, "a"), (0, "x" * (MAX_TEXT + 1))])
def test_atoms_beyond_their_limits_are_refused(index: int, text: str) -> None:
    mux = Mux(initiator=True)
    with pytest.raises(LocalProtocolError, match="atom"):
        mux.intern_atom(index, text)
    assert not mux.outgoing


@pytest.mark.parametrize("size", [0, -1, 1 << 32, UNLIMITED + 1])
def test_credit_out_of_range_is_refused(size: int) -> None:
    mux, session = reach(State.OPEN)
    with pytest.raises(LocalProtocolError, match="is out of range"):
        mux.grant(session, size)
    with pytest.raises(LocalProtocolError, match="is out of range"):
        mux.set_default_credit(size)
    with pytest.raises(LocalProtocolError, match="is out of range"):
        mux.set_mss(-1 if size <= 0 else size)
    assert not mux.outgoing


def test_large_values_take_a_long_header() -> None:
    mux, session = reach(State.OPEN)
    mux.grant(session, 0x40000)
    mux.set_mss(1 << 20)
    assert take_output(mux) == frame(session, CONTROL | Code.ADD_CREDIT << 19, value=0x40000, long=True) + frame(
        0, CONTROL | Code.SET_MSS << 19, value=1 << 20, long=True
    )


def test_only_a_syn_of_the_peer_can_be_accepted_and_only_once() -> None:
    mux, session = reach(State.SYN_RCVD)
    mux.accept(session)
    assert take_output(mux) == frame(session, SYN, value=80)
    for number in (session, 2, 9):
        with pytest.raises(LocalProtocolError, match="cannot be accepted"):
            mux.accept(number)


def test_data_in_both_directions_arrives() -> None:
    pair = Pair()
    session = pair.opened()
    for size in range(9):
        pair.initiator.send(session, bytes(range(size)), push=True)
        pair.acceptor.send(session, bytearray(range(size)), push=True)
    records = [(session, bytes(range(size)), True) for size in range(9)]
    assert merged(pair.settle()) == records + records
