"""Reservations on disk. A slow or broken disk delays requests for a bounded time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tunneld.directory import store
from tunneld.directory.database import Database
from tunneld.directory.store import ReservationStore
from tunneld.errors import StoreError
from tunneld.net.address import Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

BLOG = ReservationKey("alice", "blog")
WEEK = 604800.0


def record(port: int = 20080, holder: ReservationKey = BLOG) -> Reservation:
    return Reservation(holder, "tcp", (Port(port),), Endpoint("tcp", "127.0.0.1", port + 1))


async def start(
    directory: Path | None, nursery: trio.Nursery, table: ReservationTable | None = None, wall: float = 1e9
) -> ReservationStore:
    made = ReservationStore(table if table is not None else ReservationTable(), directory, lambda: wall)
    await made.open(WEEK)
    await nursery.start(made.run)
    return made


async def written(made: ReservationStore) -> None:
    """Wait until all changes are on disk, or the write has failed."""
    while not made.idle:
        await trio.lowlevel.checkpoint()


def stop(nursery: trio.Nursery) -> None:
    """Write nothing more, as after kill -9; the file is closed when the nursery has ended."""
    nursery.cancel_scope.cancel()


async def stored(directory: Path, wall: float = 1e9, max_seconds: float = WEEK) -> list[tuple[int, int]]:
    """The ports that a daemon would load now, and the seconds until each reservation expires."""
    table = ReservationTable()
    made = ReservationStore(table, directory, lambda: wall)
    await made.open(max_seconds)
    await made.close()
    return [(each.client_port or 0, round((each.expires or 0) - trio.current_time())) for each in table]


async def test_the_reservation_of_an_open_tunnel_is_kept_for_the_full_time_after_a_start(tmp_path: Path) -> None:
    table = ReservationTable()
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery, table)
        table.hold(record())
        await made.saved()
        stop(nursery)
    assert await stored(tmp_path, 2e9) == [(20080, WEEK)]


async def test_the_reservation_of_a_closed_tunnel_is_kept_for_the_rest_of_its_time(tmp_path: Path) -> None:
    table = ReservationTable()
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery, table)
        table.hold(record())
        table.keep_until(BLOG, trio.current_time() + 1000, max_kept=9, max_per_owner=9)
        await made.saved()
        stop(nursery)
    ((port, left),) = await stored(tmp_path, 1e9 + 400)
    assert port == 20080
    assert left == pytest.approx(600, abs=5)
    assert await stored(tmp_path, 1e9 + 1100) == []


async def test_a_clock_that_was_set_back_extends_no_reservation_beyond_the_limit(tmp_path: Path) -> None:
    table = ReservationTable()
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery, table)
        table.hold(record())
        table.keep_until(BLOG, trio.current_time() + WEEK, max_kept=9, max_per_owner=9)
        await made.saved()
        stop(nursery)
    assert await stored(tmp_path, 0.0) == [(20080, WEEK)]


async def test_repeated_starts_do_not_extend_a_reservation(tmp_path: Path) -> None:
    table = ReservationTable()
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery, table)
        table.hold(record())
        await made.saved()
        stop(nursery)
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery)
        await written(made)
        stop(nursery)
    ((_port, left),) = await stored(tmp_path, 1e9 + 4800)
    assert left == pytest.approx(WEEK - 4800, abs=5)


async def test_with_a_reservation_time_of_zero_nothing_is_loaded(tmp_path: Path) -> None:
    table = ReservationTable()
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery, table)
        table.hold(record())
        await made.saved()
        stop(nursery)
    assert await stored(tmp_path, max_seconds=0.0) == []


async def test_a_hundred_concurrent_openings_take_a_few_transactions(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ReservationTable()
    writes: list[int] = []
    write = Database.write

    def counting(self: Database, changes: Any, *, everything: bool = False) -> None:
        writes.append(len(changes))
        write(self, changes, everything=everything)

    monkeypatch.setattr(Database, "write", counting)
    made = await start(tmp_path, nursery, table)

    async def open_one(number: int) -> None:
        table.hold(record(20000 + 2 * number, ReservationKey("alice", f"n{number}")))
        await made.saved()

    async with trio.open_nursery() as openings:
        for number in range(100):
            openings.start_soon(open_one, number)
    assert sum(writes) >= 100
    assert len(writes) <= 4


async def test_without_a_directory_it_logs_that_once_and_goes_on(nursery: trio.Nursery) -> None:
    table = ReservationTable()
    with capture_logs() as logs:
        made = await start(None, nursery, table)
        table.hold(record())
        await made.saved()
    assert made.place == "memory"
    assert [line["event"] for line in logs] == ["reservations are kept in memory only: a restart loses them"]


async def test_a_failed_write_is_logged_once_and_the_whole_table_is_written_later(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ReservationTable()
    made = await start(tmp_path, nursery, table)
    table.hold(record(1, ReservationKey("alice", "before")))
    await made.saved()
    write = Database.write

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("reservations.db: database or disk is full")

    with monkeypatch.context() as full, capture_logs() as logs:
        full.setattr(Database, "write", fail)
        for number in range(3):
            table.hold(record(100 + number, ReservationKey("alice", f"n{number}")))
            await made.saved()
            await written(made)
        assert made.place == "memory"
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("could not store reservations: kept in memory until it succeeds", "reservations.db: database or disk is full")
    ]
    assert Database.write is write
    table.drop(ReservationKey("alice", "before"))
    await written(made)
    assert made.database is not None
    assert sorted(each.client_port or 0 for each in made.database.load()[0]) == [100, 101, 102]


async def test_a_hanging_disk_delays_an_opening_for_a_bounded_time_and_the_end_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ReservationTable()
    monkeypatch.setattr(store, "DISK_TIMEOUT", 0.05)
    release = threading.Event()
    with trio.fail_after(20), capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            made = await start(tmp_path, nursery, table)
            await made.saved()
            monkeypatch.setattr(Database, "write", lambda *_, **__: release.wait())
            table.hold(record())
            await made.saved()
            nursery.cancel_scope.cancel()
    release.set()
    assert "disk is slow: a reservation was acknowledged before it was stored" in [line["event"] for line in logs]


async def test_a_damaged_file_is_logged_and_replaced(tmp_path: Path, nursery: trio.Nursery) -> None:
    (tmp_path / "reservations.db").write_bytes(b"\0" * 5000)
    with capture_logs() as logs:
        made = await start(tmp_path, nursery)
    assert logs[0]["event"] == "reservations file was damaged: moved aside, started empty"
    assert made.place == str(tmp_path / "reservations.db")


def closed(database: Database) -> bool:
    try:
        database.load()
    except StoreError as error:
        return "closed" in str(error)
    return False


async def test_the_file_is_closed_when_the_task_ends(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await start(tmp_path, nursery)
        database = made.database
        assert database is not None
        nursery.cancel_scope.cancel()
    assert closed(database)


async def test_the_end_does_not_wait_for_a_hanging_write_and_the_file_is_closed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ReservationTable()
    monkeypatch.setattr(store, "DISK_TIMEOUT", 0.05)
    release = threading.Event()
    monkeypatch.setattr("tunneld.directory.database._write", lambda *_: release.wait())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            made = await start(tmp_path, nursery, table)
            database = made.database
            assert database is not None
            await written(made)
            table.hold(record())
            while not database._lock.locked():
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        release.set()
        while not closed(database):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("answer", ["late", "failed"])
async def test_a_file_opened_too_late_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(store, "DISK_TIMEOUT", 0.05)
    opened: list[Database] = []
    release = threading.Event()
    load = Database.load

    def late(self: Database) -> tuple[list[Reservation], int]:
        opened.append(self)
        release.wait()
        if answer == "failed":
            raise StoreError("disk I/O error")
        return load(self)

    with trio.fail_after(20), monkeypatch.context() as slow, capture_logs():
        slow.setattr(Database, "load", late)
        made = ReservationStore(ReservationTable(), tmp_path)
        if answer == "failed":
            release.set()
        await made.open(WEEK)
        assert made.place == "memory"
        release.set()
    with trio.fail_after(20):
        while not closed(opened[0]):
            await trio.lowlevel.checkpoint()
