"""The directory of one process: records by id, address, name and owner, found without a search."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from tunneld.config.schema import Settings, TunnelSettings
from tunneld.directory.local import LocalDirectory
from tunneld.directory.record import TunnelRecord
from tunneld.errors import UsageError
from tunneld.net.address import HostName, Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.access import Grant
from tunneld.policy.ports import Owner
from tunneld.policy.reservations import ReservationKey

ALICE, BOB = Grant("alice"), Grant("bob")
OWNER: Owner = ("alice", "")
HOST = "relay.example.org"


def new_directory(**tunnels: float) -> LocalDirectory:
    settings = Settings(tunnels=TunnelSettings.model_validate({"ports": "20000-29999", **tunnels}))
    return LocalDirectory(lambda: settings, None)


def record(number: int, name: str = "", key: str = "", owner: str = "alice", port: int = 0) -> TunnelRecord:
    port = port or 20000 + number
    return TunnelRecord(
        uid=f"u{number}",
        id=f"t{number}",
        owner=owner,
        host="192.0.2.1",
        name=name,
        backend="webmux" if key else "tcp",
        server=Endpoint("webmux", HOST, 7012, key) if key else Endpoint("tcp", HOST, port + 5000),
        ports=(port,) if key else (port, port + 5000),
        client=Endpoint("tcp", HOST, port),
        addresses=(Port(port), HostName(f"t{number}.example.org")),
        node="local",
        generation=1,
        opened=0.0,
    )


async def opened(directory: LocalDirectory, *records: TunnelRecord) -> None:
    for each in records:
        await directory.open(each)


async def test_a_record_is_found_by_id_uris_and_public_port() -> None:
    directory, plain, keyed = new_directory(), record(1), record(2, key="secret")
    await opened(directory, plain, keyed)
    for each in (plain, keyed):
        for reference in (each.id.upper(), f" {each.server} ", str(each.client), str(each.client.port)):
            assert await directory.find(reference) is each
    for reference in ("t3", "1", "020001", "7012", "", "tcp://relay.example.org:1", "9" * 30):
        assert await directory.find(reference) is None
    with pytest.raises(UsageError):
        await directory.find("tcp://")


async def test_of_two_tunnels_with_one_address_the_newest_is_found_until_it_closes() -> None:
    directory, draining, newer = new_directory(), record(1, "blog"), record(2, "blog", port=20001)
    await opened(directory, draining, newer)
    assert await directory.find("20001") is newer
    assert await directory.find(str(draining.server)) is newer
    assert await directory.held_by(newer.holder) == [draining, newer]
    await directory.remove(newer, keep=True)
    assert await directory.find("20001") is draining
    assert await directory.held_by(newer.holder) == [draining]


async def test_records_are_listed_oldest_first_by_owner() -> None:
    directory = new_directory()
    records = [record(1), record(2, owner="bob"), record(3)]
    await opened(directory, *records)
    assert await directory.list() == records
    assert await directory.list("alice") == [records[0], records[2]]
    await directory.remove(records[1], keep=None)
    assert (await directory.list("bob"), await directory.held_by(None)) == ([], ())


async def test_a_new_server_uri_replaces_the_old_one(tmp_path: Path) -> None:
    directory, before = new_directory(), record(1, "blog", key="old")
    after = replace(before, server=Endpoint("webmuxs", HOST, 7013, "new"))
    await opened(directory, before)
    await directory.update(after)
    assert await directory.find(str(before.server)) is None
    assert await directory.find(str(after.server)) is after
    assert (await directory.find("t1"), await directory.list("alice")) == (after, [after])
    assert after.holder is not None
    reserved = directory.reservations.table.find(after.holder)
    assert reserved is not None
    assert reserved.server == after.server
    await directory.remove(after, keep=False)
    await directory.update(after)
    assert await directory.list() == []


async def test_nothing_is_left_of_closed_tunnels() -> None:
    directory = new_directory(port_quarantine=0, reservation=0)
    records = [record(number, f"name-{number}" if number % 2 else "", "" if number % 3 else f"k{number}")
               for number in range(1, 30)]  # fmt: skip
    empty = {name: len(value) for name, value in sizes(directory).items()}
    await opened(directory, *records)
    for each in records:
        await directory.remove(each, keep=True)
    assert {name: len(value) for name, value in sizes(directory).items()} == empty
    assert directory.pool.quarantined(1e12) == []


def sizes(directory: LocalDirectory) -> dict[str, list[object]]:
    return {
        "names": [*directory._named._ids],
        "addresses": [*directory._by_address._ids],
        "uris": [*directory._by_uri._ids],
        "records": [*directory._records],
        "owners": [*directory._owned],
        "reservations": [*directory.reservations.table],
        "taken": [*directory.pool._taken],
    }


async def test_a_claim_changes_nothing_and_tells_what_stands_in_the_way() -> None:
    directory, mine = new_directory(), record(1, "blog")
    await opened(directory, mine)
    await directory.remove(mine, keep=True)
    holder = ReservationKey("bob", "shop")
    for _ in range(2):
        claim = await directory.claim(holder, ("bob", ""), [20001], BOB)
        assert claim.refusal.startswith("could not open a tunnel: port 20001 is reserved for another tunnel")
        assert (claim.records, claim.reservation) == ([], None)
    claim = await directory.claim(mine.holder, OWNER, [], ALICE)
    assert claim.reservation is not None
    assert (claim.reservation.addresses, claim.refusal, claim.superseded) == (mine.addresses, "", None)


async def test_ports_of_open_and_of_reserved_tunnels_are_held() -> None:
    directory = new_directory()
    await opened(directory, record(1, "blog"), record(2), record(3, key="k"), record(4, owner="bob"))
    assert directory.ports_held(OWNER, range(20000, 30000)) == 5
    await directory.remove(record(1, "blog"), keep=True)
    assert directory.ports_held(OWNER, range(20000, 30000)) == 5
    assert directory.ports_held(("bob", ""), range(20000, 30000)) == 2


class CountingKey(str):
    """A key that counts how often keys are compared or hashed."""

    operations: ClassVar[Counter[str]] = Counter()

    def __eq__(self, other: object) -> bool:
        self.operations["compared"] += 1
        return str(self) == str(other)

    def __hash__(self) -> int:
        self.operations["hashed"] += 1
        return str.__hash__(self)


@pytest.mark.parametrize("count", [1, 1000])
async def test_a_request_costs_the_same_however_many_tunnels_there_are(count: int) -> None:
    """Counted, not timed: how often the keys of tunnels are hashed or compared."""
    directory = new_directory()
    for number in range(1, count + 1):
        await directory.open(record(number, CountingKey(f"name-{number}"), CountingKey(f"key-{number}")))
    CountingKey.operations.clear()
    new = record(count + 1, CountingKey("name-new"), CountingKey("key-new"))
    claim = await directory.claim(new.holder, OWNER, [], ALICE)
    await directory.open(new, claim)
    assert await directory.find(str(new.client)) is new
    assert await directory.find("t1") is not None
    await directory.remove(new, keep=True)
    assert CountingKey.operations.total() < 80


class CountingRecords(dict[str, TunnelRecord]):
    """Records that count how often one is read."""

    reads = 0

    def __getitem__(self, tunnel: str) -> TunnelRecord:
        self.reads += 1
        return super().__getitem__(tunnel)


async def test_the_limit_of_host_names_is_checked_without_the_tunnels_that_have_none() -> None:
    directory, named = new_directory(), record(1)
    await opened(directory, named, *(replace(record(number), addresses=(Port(number),)) for number in range(2, 50)))
    directory._records = records = CountingRecords(directory._records)
    assert not await directory.why_names_refused(None, (), OWNER, ALICE)
    assert records.reads == 0
    assert not await directory.why_names_refused(None, (HostName("new.example.org"),), OWNER, ALICE)
    assert records.reads == 1
    await directory.remove(named, keep=False)
    assert not await directory.why_names_refused(None, (HostName("new.example.org"),), OWNER, ALICE)
    assert records.reads == 1
