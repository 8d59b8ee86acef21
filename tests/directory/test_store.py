"""The book is kept on disk, and a disk that does not work never keeps anybody waiting for long."""

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
from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

BLOG = ReservationKey("alice", "blog")
WEEK = 604800.0


def record(port: int = 20080, holder: ReservationKey = BLOG) -> Reservation:
    return Reservation(holder, "tcp", port, Endpoint("tcp", "127.0.0.1", port + 1))


async def begun(
    folder: Path | None, nursery: trio.Nursery, kept_for: float = WEEK, wall: float = 1e9
) -> ReservationStore:
    made = ReservationStore(ReservationTable(), folder, lambda: wall)
    await made.open(kept_for)
    await nursery.start(made.run)
    return made


async def written(made: ReservationStore) -> None:
    """Wait until everything is on disk, or was tried."""
    while made._pending or not made._in_hand.is_set():
        await trio.lowlevel.checkpoint()


def ended(nursery: trio.Nursery) -> None:
    """Nothing more is written, as after kill -9; the file is closed when the nursery has ended."""
    nursery.cancel_scope.cancel()


async def after(folder: Path, wall: float = 1e9, kept_for: float = WEEK) -> list[tuple[int, int]]:
    """The ports that a daemon would find that starts now, and for how long each is kept."""
    made = ReservationStore(ReservationTable(), folder, lambda: wall)
    await made.open(kept_for)
    await made.close()
    return [(each.client_port, round((each.expires or 0) - trio.current_time())) for each in made._book]


async def test_what_was_held_is_kept_for_the_whole_time_after_a_start(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        made._book.hold(record())
        await made.saved()
        ended(nursery)
    assert await after(tmp_path, 2e9) == [(20080, WEEK)]


async def test_what_was_away_is_kept_for_the_rest_of_its_time(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        made._book.hold(record())
        made._book.leave(BLOG, trio.current_time() + 1000, most=9, most_per_owner=9)
        await made.saved()
        ended(nursery)
    ((port, left),) = await after(tmp_path, 1e9 + 400)
    assert port == 20080
    assert left == pytest.approx(600, abs=5)
    assert await after(tmp_path, 1e9 + 1100) == []


async def test_a_clock_that_was_set_back_keeps_nothing_longer_than_it_may_be_kept(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        made._book.hold(record())
        made._book.leave(BLOG, trio.current_time() + WEEK, most=9, most_per_owner=9)
        await made.saved()
        ended(nursery)
    assert await after(tmp_path, 0.0) == [(20080, WEEK)]


async def test_a_daemon_that_starts_again_and_again_does_not_keep_an_address_for_ever(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        made._book.hold(record())
        await made.saved()
        ended(nursery)
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        while made._everything:
            await trio.lowlevel.checkpoint()
        ended(nursery)
    ((_port, left),) = await after(tmp_path, 1e9 + 4800)
    assert left == pytest.approx(WEEK - 4800, abs=5)


async def test_where_nothing_is_to_be_kept_nothing_is_read(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        made._book.hold(record())
        await made.saved()
        ended(nursery)
    assert await after(tmp_path, kept_for=0.0) == []


async def test_a_hundred_openings_at_once_take_a_few_transactions(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write = Database.write

    def counting(self: Database, changes: Any, *, everything: bool = False) -> None:
        writes.append(len(changes))
        write(self, changes, everything=everything)

    monkeypatch.setattr(Database, "write", counting)
    made = await begun(tmp_path, nursery)

    async def open_one(number: int) -> None:
        made._book.hold(record(20000 + 2 * number, ReservationKey("alice", f"n{number}")))
        await made.saved()

    async with trio.open_nursery() as openings:
        for number in range(100):
            openings.start_soon(open_one, number)
    assert sum(writes) >= 100
    assert len(writes) <= 4


async def test_without_a_place_it_says_so_once_and_goes_on(nursery: trio.Nursery) -> None:
    with capture_logs() as logs:
        made = await begun(None, nursery)
        made._book.hold(record())
        await made.saved()
    assert made.place == "memory"
    assert [line["event"] for line in logs] == ["reservations are kept in memory only: a restart forgets them"]


async def test_a_disk_that_fails_is_told_once_and_written_whole_when_it_works_again(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await begun(tmp_path, nursery)
    made._book.hold(record(1, ReservationKey("alice", "before")))
    await made.saved()
    write = Database.write

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("reservations.db: database or disk is full")

    with monkeypatch.context() as full, capture_logs() as logs:
        full.setattr(Database, "write", fail)
        for number in range(3):
            made._book.hold(record(100 + number, ReservationKey("alice", f"n{number}")))
            await made.saved()
            await written(made)
        assert made.place == "memory"
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("could not store reservations: kept in memory until it can", "reservations.db: database or disk is full")
    ]
    assert Database.write is write
    made._book.drop(ReservationKey("alice", "before"))
    await written(made)
    assert made._database is not None
    assert sorted(each.client_port for each in made._database.load()[0]) == [100, 101, 102]


async def test_a_disk_that_hangs_holds_up_an_opening_for_a_bounded_time_and_the_end_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    let_go = threading.Event()
    with trio.fail_after(20), capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            made = await begun(tmp_path, nursery)
            await made.saved()
            monkeypatch.setattr(Database, "write", lambda *_, **__: let_go.wait())
            made._book.hold(record())
            await made.saved()
            nursery.cancel_scope.cancel()
    let_go.set()
    assert "disk is slow: a reservation was acknowledged before it was stored" in [line["event"] for line in logs]


async def test_a_damaged_file_is_told_and_the_daemon_goes_on_with_a_new_one(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    (tmp_path / "reservations.db").write_bytes(b"\0" * 5000)
    with capture_logs() as logs:
        made = await begun(tmp_path, nursery)
    assert logs[0]["event"] == "file of reservations was damaged: put aside, begun anew"
    assert made.place == str(tmp_path / "reservations.db")


def closed(database: Database) -> bool:
    try:
        database.load()
    except StoreError as error:
        return "closed" in str(error)
    return False


async def test_the_file_is_closed_when_the_task_ends(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        made = await begun(tmp_path, nursery)
        database = made._database
        assert database is not None
        nursery.cancel_scope.cancel()
    assert closed(database)


async def test_a_write_that_hangs_is_not_waited_for_but_the_file_is_closed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    let_go = threading.Event()
    monkeypatch.setattr(Database, "_write", lambda *_: let_go.wait())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            made = await begun(tmp_path, nursery)
            database = made._database
            assert database is not None
            await written(made)
            made._book.hold(record())
            while not database._in_use.locked():
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        let_go.set()
        while not closed(database):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("answer", ["late", "spoiled"])
async def test_a_file_that_is_opened_in_vain_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    opened: list[Database] = []
    let_go = threading.Event()
    load = Database.load

    def late(self: Database) -> tuple[list[Reservation], int]:
        opened.append(self)
        let_go.wait()
        if answer == "spoiled":
            raise StoreError("disk I/O error")
        return load(self)

    with trio.fail_after(20), monkeypatch.context() as slow, capture_logs():
        slow.setattr(Database, "load", late)
        made = ReservationStore(ReservationTable(), tmp_path)
        if answer == "spoiled":
            let_go.set()
        await made.open(WEEK)
        assert made.place == "memory"
        let_go.set()
    with trio.fail_after(20):
        while not closed(opened[0]):
            await trio.lowlevel.checkpoint()
