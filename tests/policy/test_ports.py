"""Which ports a new tunnel may get: free ones at random, a freed one for its last owner only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunneld.errors import LimitReachedError
from tunneld.net.address import Port
from tunneld.policy.ports import FreePorts, Owner, PortChoice, PortPool

ALICE: Owner = ("alice", "")
BOB: Owner = ("bob", "")
RANGE = range(20000, 20004)
QUARANTINE = 60.0


def last(count: int) -> int:
    """Draw the last port of those that are left."""
    return count - 1


@pytest.fixture
def pool() -> PortPool:
    return PortPool(lambda: QUARANTINE, last)


def test_taken_ports_are_not_tried(pool: PortPool) -> None:
    pool.take(20001, ALICE)
    assert sorted(pool.candidates(RANGE, 0.0)) == [20000, 20002, 20003]


def test_a_freed_port_is_tried_after_all_free_ones_and_the_longest_free_first(pool: PortPool) -> None:
    for port in (20003, 20000):
        pool.take(port, ALICE)
    pool.give_back(20003, ALICE, 1.0)
    pool.give_back(20000, ALICE, 2.0)
    assert list(pool.candidates(RANGE, 3.0))[2:] == [20003, 20000]


def test_a_freed_port_is_open_to_its_last_owner_at_once_and_to_others_after_the_quarantine(pool: PortPool) -> None:
    pool.take(20001, ALICE)
    assert not pool.is_open_to(20001, BOB, 0.0)
    pool.give_back(20001, ALICE, 0.0)
    pool.check(20001, ALICE, 0.0)
    with pytest.raises(
        LimitReachedError,
        match=r"port 20001 was freed by another owner .*: try again in 43 s, or use another port "
        r"\(tunnels.port_quarantine\)",
    ):
        pool.check(20001, BOB, 17.0)
    assert not pool.is_open_to(20001, BOB, QUARANTINE - 0.001)
    pool.check(20001, BOB, QUARANTINE)
    assert pool.quarantined(QUARANTINE) == []


def test_a_port_in_use_by_another_owner_is_refused_even_where_nothing_listens(pool: PortPool) -> None:
    """As while its tunnel drains."""
    pool.take(20001, ALICE)
    with pytest.raises(LimitReachedError, match="no port is free in 20001"):
        pool.check(20001, BOB, 0.0)


def test_a_port_that_a_successor_has_is_not_freed_by_the_draining_tunnel(pool: PortPool) -> None:
    pool.take(20001, ALICE)
    pool.take(20001, ALICE)
    pool.give_back(20001, ALICE, 0.0)
    assert (pool.quarantined(0.0), pool.count_of(ALICE)) == ([], 1)
    assert 20001 not in pool.candidates(RANGE, 0.0)
    pool.give_back(20001, ALICE, 1.0)
    assert (pool.quarantined(3.0), pool.count_of(ALICE)) == ([(20001, ALICE, 2.0)], 0)


def test_a_quarantine_continues_in_another_process(pool: PortPool) -> None:
    pool.take(20001, ALICE)
    pool.give_back(20001, ALICE, 0.0)
    successor = PortPool(lambda: QUARANTINE, last)
    for port, owner, seconds in pool.quarantined(20.0):
        successor.restore(port, owner, 1000.0 - seconds)
    assert not successor.is_open_to(20001, BOB, 1000.0 + QUARANTINE - 20.001)
    assert successor.is_open_to(20001, BOB, 1000.0 + QUARANTINE - 20.0)


def test_without_a_quarantine_a_port_is_free_at_once() -> None:
    pool = PortPool(lambda: 0.0, last)
    pool.take(20001, ALICE)
    pool.give_back(20001, ALICE, 5.0)
    pool.check(20001, BOB, 5.0)
    assert sorted(pool.candidates(RANGE, 5.0)) == list(RANGE)


def test_a_shorter_quarantine_applies_at_once() -> None:
    seconds = 60.0
    pool = PortPool(lambda: seconds, last)
    pool.take(20001, ALICE)
    pool.give_back(20001, ALICE, 0.0)
    assert not pool.is_open_to(20001, BOB, 5.0)
    seconds = 5.0
    assert pool.is_open_to(20001, BOB, 5.0)


def test_another_range_has_its_own_free_ports(pool: PortPool) -> None:
    pool.take(20001, ALICE)
    assert len(list(pool.candidates(RANGE, 0.0))) == 3
    pool.take(30001, ALICE)
    assert sorted(pool.candidates(range(30000, 30003), 0.0)) == [30000, 30002]
    assert sorted(pool.candidates(RANGE, 0.0)) == [20000, 20002, 20003]


def test_a_choice_leaves_reserved_ports_out_and_counts_them(pool: PortPool) -> None:
    choice = PortChoice(pool, {Port(20000), Port(20001)}, ALICE, lambda: 0.0)
    pool.take(20002, BOB)
    assert list(choice.candidates(RANGE)) == [20003]
    assert choice.why_none(RANGE) == "2 are reserved for named tunnels (tunnels.reservation)"
    assert [port for port in RANGE if choice.accepts(port)] == [20003]


def test_a_port_is_found_in_one_draw_however_many_are_taken() -> None:
    """Counted, not timed: a search through the range would look at every port."""
    draws = 0

    def draw(count: int) -> int:
        nonlocal draws
        draws += 1
        return count // 2

    ports = range(20000, 30000)
    pool = PortPool(lambda: QUARANTINE, draw)
    for _ in range(len(ports)):
        pool.take(next(iter(pool.candidates(ports, 0.0))), ALICE)
    assert draws == len(ports)
    assert list(pool.candidates(ports, 0.0)) == []


class FreePortsModel(RuleBasedStateMachine):
    """`FreePorts` beside a set."""

    def __init__(self) -> None:
        super().__init__()
        self.free = FreePorts(range(100, 110))
        self.model = set(range(100, 110))
        self.draws: Iterator[int] = iter(())

    @rule(port=st.integers(98, 112))
    def add(self, port: int) -> None:
        self.free.add(port)
        self.model |= {port} & set(range(100, 110))

    @rule(port=st.integers(98, 112))
    def remove(self, port: int) -> None:
        self.free.remove(port)
        self.model.discard(port)

    @rule(seed=st.integers(0, 1000), taken=st.integers(0, 10))
    def draw(self, seed: int, taken: int) -> None:
        drawn = [port for port, _ in zip(self.free.drawn(lambda count: seed % count), range(taken), strict=False)]
        assert len(set(drawn)) == min(taken, len(self.model))
        assert set(drawn) <= self.model

    @invariant()
    def agree(self) -> None:
        assert len(self.free) == len(self.model)
        assert sorted(self.free.drawn(lambda _count: 0)) == sorted(self.model)


TestFreePorts = FreePortsModel.TestCase
