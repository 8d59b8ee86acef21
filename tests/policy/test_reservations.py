"""The table of reservations: which holder has which address, until when, and which reservation is dropped first."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunneld.net.address import Address, HostName, Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

BLOG, SHOP = ReservationKey("alice", "blog"), ReservationKey("bob", "shop")


def record(holder: ReservationKey, client_port: int, server_port: int | None = None) -> Reservation:
    server = Endpoint("tcp", "relay.example.org", server_port or client_port + 10_000)
    return Reservation(holder, "tcp", (Port(client_port),), server)


def close(
    table: ReservationTable, holder: ReservationKey, expires: float = 100.0, max_kept: int = 9, max_per_owner: int = 9
) -> list[int]:
    dropped = table.keep_until(holder, expires, max_kept=max_kept, max_per_owner=max_per_owner)
    return [each.client_port or 0 for each in dropped]


def test_both_ports_are_reserved_until_the_reservation_expires() -> None:
    table = ReservationTable()
    table.hold(record(BLOG, 20080, 20081))
    close(table, BLOG, 100.0)
    assert Port(20080) in table
    assert Port(20081) in table
    table.expire(99.9)
    assert Port(20080) in table
    table.expire(100.0)
    assert Port(20080) not in table
    assert Port(20081) not in table


def test_the_reservation_of_an_open_tunnel_does_not_expire() -> None:
    table = ReservationTable()
    table.hold(record(BLOG, 20080))
    table.expire(1e12)
    assert table.find(BLOG) == record(BLOG, 20080)


def test_a_shared_server_port_is_reserved_until_its_last_reservation_is_dropped() -> None:
    table = ReservationTable()
    table.hold(record(BLOG, 20080, 7012))
    table.hold(record(SHOP, 20081, 7012))
    table.drop(BLOG)
    assert Port(7012) in table
    table.drop(SHOP)
    assert Port(7012) not in table


def test_a_holder_with_a_new_address_loses_the_old_one() -> None:
    table = ReservationTable()
    table.hold(record(BLOG, 20080))
    table.hold(record(BLOG, 20090))
    assert Port(20080) not in table
    assert Port(20090) in table


def test_bytes_that_count_against_a_quota_do_not_become_fewer_until_the_reservation_is_dropped() -> None:
    changed: list[ReservationKey] = []
    table = ReservationTable(changed.append)
    table.hold(record(BLOG, 20080))
    table.meter(BLOG, 1000)
    table.meter(BLOG, 900)
    assert changed == [BLOG, BLOG], "one for the tunnel, one for its bytes"
    close(table, BLOG)
    table.hold(record(BLOG, 20080))
    assert table.find(BLOG) == replace(record(BLOG, 20080), metered=1000)
    table.drop(BLOG)
    table.meter(BLOG, 1)
    table.hold(record(BLOG, 20080))
    assert table.find(BLOG) == record(BLOG, 20080)


def test_beyond_the_limit_of_an_owner_its_oldest_reservation_is_dropped() -> None:
    table = ReservationTable()
    for port in (1, 2, 3):
        table.hold(record(ReservationKey("alice", f"n{port}"), port))
        table.hold(record(ReservationKey("bob", f"n{port}"), port + 100))
    assert close(table, ReservationKey("alice", "n2"), max_per_owner=2) == []
    assert close(table, ReservationKey("alice", "n1"), max_per_owner=2) == []
    assert close(table, ReservationKey("bob", "n1"), max_per_owner=2) == []
    assert close(table, ReservationKey("alice", "n3"), max_per_owner=2) == [2]


def test_beyond_the_limit_of_all_the_owner_with_the_most_loses_its_oldest() -> None:
    table = ReservationTable()
    for name, port in (("a", 1), ("b", 2), ("c", 3)):
        table.hold(record(ReservationKey("alice", name), port))
        assert close(table, ReservationKey("alice", name), max_kept=3) == []
    table.hold(record(SHOP, 4))
    assert close(table, SHOP, max_kept=3) == [1]


def test_without_credentials_each_address_is_an_owner() -> None:
    table = ReservationTable()
    for host in ("192.0.2.1", "192.0.2.2"):
        for name, port in (("a", 1), ("b", 2)):
            holder = ReservationKey("", name, host)
            table.hold(record(holder, port + int(host[-1]) * 10))
            assert close(table, holder, max_per_owner=2) == []
    table.hold(record(ReservationKey("", "c", "192.0.2.1"), 13))
    assert close(table, ReservationKey("", "c", "192.0.2.1"), max_per_owner=2) == [11]


def test_reservations_of_removed_credentials_are_dropped() -> None:
    table = ReservationTable()
    table.hold(record(BLOG, 1))
    table.hold(record(SHOP, 2))
    table.hold(record(ReservationKey("", "open", "192.0.2.1"), 3))
    assert [each.holder.name for each in table.retain({"alice"})] == ["shop", "open"]
    assert [each.holder for each in table.retain(())] == [BLOG]


def test_of_two_loaded_records_with_the_same_port_the_first_is_kept() -> None:
    table = ReservationTable()
    table.load([record(BLOG, 1), record(SHOP, 1)])
    assert [each.holder for each in table] == [BLOG]


def test_a_tunnel_with_several_addresses_reserves_all_of_them() -> None:
    name: Address = HostName("blog.example.org")
    both = Reservation(BLOG, "webmux", (Port(20080), name), Endpoint("webmux", "relay.example.org", 7012, "key"))
    table = ReservationTable()
    table.hold(both)
    assert all(address in table for address in (name, Port(20080), Port(7012)))
    assert table.find_by_address(name) == table.find_by_address(Port(20080)) == table.find(BLOG)
    assert table.find_by_address(Port(7012)) is None
    table.load([Reservation(SHOP, "webmux", (name,), both.server)])
    assert table.find(SHOP) is None
    table.drop(BLOG)
    assert not any(address in table for address in (name, Port(20080), Port(7012)))


def test_each_change_is_reported_once_and_loading_is_not() -> None:
    reported: list[ReservationKey] = []
    table = ReservationTable(reported.append)
    table.load([record(SHOP, 2)])
    table.hold(record(BLOG, 1))
    table.hold(record(BLOG, 1))
    close(table, BLOG)
    table.drop(BLOG)
    table.drop(BLOG)
    assert reported == [BLOG, BLOG, BLOG]


HOLDERS = st.builds(ReservationKey, st.sampled_from(["", "alice", "bob"]), st.sampled_from("abcd"))


class AnySequence(RuleBasedStateMachine):
    """After any sequence of changes the ports match the records, and the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReservationTable()
        self.now = 0.0

    @rule(holder=HOLDERS, port=st.integers(1, 8))
    def hold(self, holder: ReservationKey, port: int) -> None:
        if Port(port) not in self.table:
            self.table.hold(record(holder, port, 99 if port % 2 else None))

    @rule(holder=HOLDERS, after=st.floats(0, 10))
    def close(self, holder: ReservationKey, after: float) -> None:
        close(self.table, holder, self.now + after, max_kept=4, max_per_owner=2)

    @rule(holder=HOLDERS)
    def drop(self, holder: ReservationKey) -> None:
        self.table.drop(holder)
        assert self.table.find(holder) is None

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.table.expire(self.now)

    @invariant()
    def ports_are_those_of_the_records(self) -> None:
        possible = {99, *range(1, 9), *range(10_001, 10_009)}
        assert {port for port in possible if Port(port) in self.table} == {
            address.number for each in self.table for address in each.held if isinstance(address, Port)
        }

    @invariant()
    def the_ports_of_closed_tunnels_are_counted_by_owner(self) -> None:
        kept = [each for each in self.table if each.expires is not None]
        for owner in {each.holder.owner for each in kept} | {("nobody", "")}:
            mine = {port for each in kept if each.holder.owner == owner for port in each.ports}
            assert set(self.table.kept_ports(owner)) == mine

    @invariant()
    def limits_hold(self) -> None:
        kept = [each for each in self.table if each.expires is not None]
        assert len(kept) <= 4
        for owner in {each.holder.owner for each in kept}:
            assert sum(each.holder.owner == owner for each in kept) <= 2


TestAnySequence = AnySequence.TestCase
