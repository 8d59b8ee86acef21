"""Outstanding requests: the table of states, which response fits, timeouts, limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunneld.errors import LimitReachedError, LocalProtocolError, RemoteProtocolError
from tunneld.wire.egtp.ids import id_of
from tunneld.wire.egtp.messages import MojoRequest, MojoResponse, response_to
from tunneld.wire.egtp.requests import (
    ENDED,
    TRANSITIONS,
    OutstandingRequest,
    RequestEvent,
    RequestState,
    RequestTable,
)

PEER, OTHER = b"P" * 20, b"O" * 20


def request(number: int = 0, kind: bytes = b"pass this along v2", peer: bytes = PEER) -> MojoRequest:
    return MojoRequest(kind, peer, b"%020d" % number, None)


def response(asked: MojoRequest) -> MojoResponse:
    return response_to(asked, id_of(asked.encode()), None)


def add(table: RequestTable, asked: MojoRequest, now: float = 0, **timeouts: float) -> OutstandingRequest:
    return table.add(asked, id_of(asked.encode()), now, **timeouts)


def test_every_state_knows_every_input_or_is_over() -> None:
    live = set(RequestState) - ENDED
    missing = {(RequestState.OVERDUE, RequestEvent.SOFT_TIMEOUT)}  # a request has one soft timeout
    assert {(state, happened) for state in live for happened in RequestEvent} - set(TRANSITIONS) == missing
    assert {state for state, _ in TRANSITIONS} == live


def test_a_response_ends_its_request_once() -> None:
    table, asked = RequestTable(), request()
    entry = add(table, asked)
    assert table.answered(response(asked), PEER) is entry
    assert entry.state is RequestState.ANSWERED
    assert table.answered(response(asked), PEER) is None
    assert (len(table), table.next_deadline) == (0, math.inf)


def test_the_soft_timeout_notifies_and_the_timeout_ends() -> None:
    table, asked = RequestTable(), request()
    entry = add(table, asked, now=100, timeout=30, soft_timeout=10)
    assert table.next_deadline == 110
    assert table.due(109) == []
    assert (table.due(110), entry.state) == ([entry], RequestState.OVERDUE)
    assert (table.due(129), table.next_deadline) == ([], 130)
    assert (table.due(130), entry.state) == ([entry], RequestState.EXPIRED)
    assert table.answered(response(asked), PEER) is None


def test_an_overdue_request_can_still_be_answered() -> None:
    table, asked = RequestTable(), request()
    add(table, asked, soft_timeout=10)
    table.due(10)
    assert table.answered(response(asked), PEER) is not None
    assert table.due(1000) == []


def test_both_timeouts_at_once_are_one_end() -> None:
    table = RequestTable()
    entry = add(table, request(), timeout=30, soft_timeout=10)
    assert (table.due(31), entry.state, len(table)) == ([entry], RequestState.EXPIRED, 0)


def test_only_the_node_that_was_asked_may_answer() -> None:
    table, asked = RequestTable(), request()
    add(table, asked)
    with pytest.raises(RemoteProtocolError, match="another node"):
        table.answered(response(asked), OTHER)
    assert table.answered(response(asked), PEER) is not None


def test_the_type_must_fit() -> None:
    table, asked = RequestTable(), request()
    add(table, asked)
    with pytest.raises(RemoteProtocolError, match=r"type 'hello response' to 'pass this along v2'"):
        table.answered(replace(response(asked), kind=b"hello response"), PEER)
    assert table.answered(replace(response(asked), kind=b"pass this along response"), PEER) is not None


@pytest.mark.parametrize("timeout", [0, -1, 3600.5, math.inf, math.nan])
def test_timeouts_out_of_range(timeout: float) -> None:
    with pytest.raises(LocalProtocolError, match="out of range"):
        add(RequestTable(), request(), timeout=timeout)


def test_a_nonce_is_used_once_and_the_number_of_requests_is_limited() -> None:
    table = RequestTable(limit=2)
    add(table, request(1))
    with pytest.raises(LocalProtocolError, match="new nonce"):
        add(table, request(1))
    add(table, request(2))
    with pytest.raises(LimitReachedError, match="too many EGTP requests"):
        add(table, request(3))


def test_requests_to_a_lost_peer_expire() -> None:
    table = RequestTable()
    lost, kept = add(table, request(1)), add(table, request(2, peer=OTHER))
    assert table.lost(PEER) == [lost]
    assert lost.state is RequestState.EXPIRED
    assert kept.state is RequestState.WAITING


def test_answered_requests_leave_nothing_behind() -> None:
    table = RequestTable()
    add(table, request(0))
    for number in range(1, 500):
        asked = request(number)
        add(table, asked)
        table.answered(response(asked), PEER)
    assert len(table._deadlines) < 30


class RequestMachine(RuleBasedStateMachine):
    """A table against a list that is searched."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable(limit=8)
        self.now = 0.0
        self.model: list[tuple[MojoRequest, OutstandingRequest]] = []
        self.number = 0

    @rule(timeout=st.integers(1, 9), soft=st.integers(1, 9))
    def add(self, timeout: int, soft: int) -> None:
        self.number += 1
        asked = request(self.number)
        if len(self.model) < 8:
            self.model.append((asked, add(self.table, asked, self.now, timeout=timeout, soft_timeout=soft)))

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if self.model:
            asked, entry = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
            assert self.table.answered(response(asked), PEER) is entry

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        waited = {id(entry) for _, entry in self.model if entry.state is RequestState.WAITING}
        told = self.table.due(self.now)
        expected = {
            id(entry)
            for _, entry in self.model
            if entry.deadline <= self.now or (entry.soft_deadline <= self.now and id(entry) in waited)
        }
        assert {id(entry) for entry in told} == expected
        self.model = [(asked, entry) for asked, entry in self.model if entry.deadline > self.now]

    @invariant()
    def same(self) -> None:
        assert len(self.table) == len(self.model)
        assert all(entry.state not in ENDED for _, entry in self.model)
        assert (self.table.next_deadline == math.inf) == (not self.model)


TestRequestMachine = RequestMachine.TestCase
TestRequestMachine.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
