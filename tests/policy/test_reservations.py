"""The book of reservations: who has which address, for how long, and who makes room."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

BLOG, SHOP = ReservationKey("alice", "blog"), ReservationKey("bob", "shop")


def record(holder: ReservationKey, client_port: int, server_port: int | None = None) -> Reservation:
    server = Endpoint("tcp", "relay.example.org", server_port or client_port + 10_000)
    return Reservation(holder, "tcp", client_port, server)


def leave(
    book: ReservationTable, holder: ReservationKey, expires: float = 100.0, most: int = 9, most_per_owner: int = 9
) -> list[int]:
    gone = book.leave(holder, expires, most=most, most_per_owner=most_per_owner)
    return [each.client_port for each in gone]


def test_both_ports_are_somebodys_until_the_time_is_over() -> None:
    book = ReservationTable()
    book.hold(record(BLOG, 20080, 20081))
    leave(book, BLOG, 100.0)
    assert 20080 in book
    assert 20081 in book
    book.expire(99.9)
    assert 20080 in book
    book.expire(100.0)
    assert 20080 not in book
    assert 20081 not in book


def test_one_that_is_held_does_not_expire() -> None:
    book = ReservationTable()
    book.hold(record(BLOG, 20080))
    book.expire(1e12)
    assert book.find(BLOG) == record(BLOG, 20080)


def test_a_port_of_a_shared_server_side_is_free_when_the_last_one_is_gone() -> None:
    book = ReservationTable()
    book.hold(record(BLOG, 20080, 7012))
    book.hold(record(SHOP, 20081, 7012))
    book.drop(BLOG)
    assert 7012 in book
    book.drop(SHOP)
    assert 7012 not in book


def test_who_comes_back_elsewhere_gives_up_where_it_was() -> None:
    book = ReservationTable()
    book.hold(record(BLOG, 20080))
    book.hold(record(BLOG, 20090))
    assert 20080 not in book
    assert 20090 in book


def test_the_oldest_of_an_owner_makes_room_and_nobody_elses() -> None:
    book = ReservationTable()
    for port in (1, 2, 3):
        book.hold(record(ReservationKey("alice", f"n{port}"), port))
        book.hold(record(ReservationKey("bob", f"n{port}"), port + 100))
    assert leave(book, ReservationKey("alice", "n2"), most_per_owner=2) == []
    assert leave(book, ReservationKey("alice", "n1"), most_per_owner=2) == []
    assert leave(book, ReservationKey("bob", "n1"), most_per_owner=2) == []
    assert leave(book, ReservationKey("alice", "n3"), most_per_owner=2) == [2]


def test_when_all_are_too_many_whoever_has_most_makes_room() -> None:
    book = ReservationTable()
    for name, port in (("a", 1), ("b", 2), ("c", 3)):
        book.hold(record(ReservationKey("alice", name), port))
        assert leave(book, ReservationKey("alice", name), most=3) == []
    book.hold(record(SHOP, 4))
    assert leave(book, SHOP, most=3) == [1]


def test_without_credentials_each_address_is_an_owner() -> None:
    book = ReservationTable()
    for host in ("192.0.2.1", "192.0.2.2"):
        for name, port in (("a", 1), ("b", 2)):
            holder = ReservationKey("", name, host)
            book.hold(record(holder, port + int(host[-1]) * 10))
            assert leave(book, holder, most_per_owner=2) == []
    book.hold(record(ReservationKey("", "c", "192.0.2.1"), 13))
    assert leave(book, ReservationKey("", "c", "192.0.2.1"), most_per_owner=2) == [11]


def test_what_belongs_to_a_credential_that_is_no_more_is_dropped() -> None:
    book = ReservationTable()
    book.hold(record(BLOG, 1))
    book.hold(record(SHOP, 2))
    book.hold(record(ReservationKey("", "open", "192.0.2.1"), 3))
    assert [each.holder.name for each in book.retain({"alice"})] == ["shop", "open"]
    assert [each.holder for each in book.retain(())] == [BLOG]


def test_of_two_records_in_a_file_with_the_same_port_the_first_counts() -> None:
    book = ReservationTable()
    book.load([record(BLOG, 1), record(SHOP, 1)])
    assert [each.holder for each in book] == [BLOG]


def test_changes_are_told_once_and_reading_is_none() -> None:
    told: list[ReservationKey] = []
    book = ReservationTable(told.append)
    book.load([record(SHOP, 2)])
    book.hold(record(BLOG, 1))
    book.hold(record(BLOG, 1))
    leave(book, BLOG)
    book.drop(BLOG)
    book.drop(BLOG)
    assert told == [BLOG, BLOG, BLOG]


HOLDERS = st.builds(ReservationKey, st.sampled_from(["", "alice", "bob"]), st.sampled_from("abcd"))


class AnyStory(RuleBasedStateMachine):
    """Whatever happens, the ports are those of the records, and the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.book = ReservationTable()
        self.now = 0.0

    @rule(holder=HOLDERS, port=st.integers(1, 8))
    def hold(self, holder: ReservationKey, port: int) -> None:
        if port not in self.book:
            self.book.hold(record(holder, port, 99 if port % 2 else None))

    @rule(holder=HOLDERS, after=st.floats(0, 10))
    def leave(self, holder: ReservationKey, after: float) -> None:
        leave(self.book, holder, self.now + after, most=4, most_per_owner=2)

    @rule(holder=HOLDERS)
    def drop(self, holder: ReservationKey) -> None:
        self.book.drop(holder)
        assert self.book.find(holder) is None

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.book.expire(self.now)

    @invariant()
    def ports_are_those_of_the_records(self) -> None:
        possible = {99, *range(1, 9), *range(10_001, 10_009)}
        assert {port for port in possible if port in self.book} == {port for each in self.book for port in each.ports}

    @invariant()
    def limits_hold(self) -> None:
        away = [each for each in self.book if each.expires is not None]
        assert len(away) <= 4
        for owner in {each.holder.owner for each in away}:
            assert sum(each.holder.owner == owner for each in away) <= 2


TestAnyStory = AnyStory.TestCase
