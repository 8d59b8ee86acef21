"""The task that writes the table of reservations to disk.

    changed ──► pending ──► one transaction in a thread ──► saved
                   ▲                     │ failed: logged once, and the whole table is written at the next attempt
                   └─────────────────────┘

The event loop never waits for a disk. A request that opens a tunnel does, for at most `DISK_TIMEOUT`: its answer means
that the address is reserved. All changes while the disk is busy go into the next transaction, so a hundred tunnels that
reopen at the same moment cost a few writes and not a hundred. No error here stops the daemon from serving.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from tunneld.directory.database import Change, Database
from tunneld.errors import StoreError
from tunneld.policy.reservations import Reservation, ReservationKey, ReservationTable

DISK_TIMEOUT = 2.0
"""Seconds that the opening of a tunnel waits for the disk; a start waits for the file twice as long. Far above what a
working disk takes.
"""
RETRY_INTERVAL = 30.0
"""Seconds until a failed write is repeated if nothing changes before: an administrator may have freed disk space."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("store")
T = TypeVar("T")


class ReservationStore:
    """Keeps a table of reservations on disk, where there is a directory for it."""

    def __init__(self, table: ReservationTable, directory: Path | None, clock: Callable[[], float] = time.time) -> None:
        """`clock` returns seconds since 1970."""
        self.database: Database | None = None
        self._table = table
        self._directory = directory
        self._clock = clock
        self._pending: set[ReservationKey] = set()
        self._everything = (
            False  # whether the content of the file is unknown, so that the whole table has to be written
        )
        self._healthy = True  # whether the last write succeeded
        self._changed = trio.Event()
        self._next_write = trio.Event()  # set when the pending changes have been written, or could not be
        self._current_write = trio.Event()  # the same for the changes that are being written
        self._current_write.set()
        self._thread = trio.CapacityLimiter(1)

    @property
    def place(self) -> str:
        """Where reservations are stored, for `status`: the path of the file, or `memory`."""
        return str(self.database.path) if self.database is not None and self._healthy else "memory"

    @property
    def idle(self) -> bool:
        """Whether there is nothing to write, or the last attempt to write it has failed."""
        return not self._pending and self._current_write.is_set() and not (self._everything and self._healthy)

    async def open(self, max_seconds: float) -> None:
        """Open the file and load the table from it. Reservations of tunnels that were open or closed when the daemon
        ended expire at most `max_seconds` from now. Without a file, log the reason and keep them in memory.
        """
        try:
            if self._directory is None:
                raise StoreError("no directory for a file: set daemon.state")
            opening = _Opening(self._directory)
            try:
                with trio.fail_after(DISK_TIMEOUT * 2):
                    database, records, invalid_rows = await self._in_thread(opening.run)
            except BaseException:
                opening.abandon()
                raise
        except trio.TooSlowError:
            self._log_unavailable(f"{self._directory}: no answer within {DISK_TIMEOUT * 2:g} s")
        except StoreError as error:
            self._log_unavailable(str(error))
        else:
            self.database = database
            if database.damage:
                log.error(
                    "reservations file was damaged: moved aside, started empty",
                    damage=database.damage,
                    aside=f"{database.path}.damaged",
                )
            if invalid_rows:
                log.warning("reservations file has invalid rows: ignored", rows=invalid_rows)
            self._table.load(self._from_wall_clock(records, max_seconds))
            self._everything = True  # with new times for open tunnels, and without expired reservations
            self._changed.set()
            log.info("reservations loaded", file=str(database.path), count=len(self._table))
        self._table.changed = self._on_change

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write changes until cancelled, then close the file."""
        try:
            task_status.started()
            while self.database is not None:
                with trio.move_on_after(math.inf if self._healthy else RETRY_INTERVAL):
                    await self._changed.wait()
                self._changed = trio.Event()
                await self._write(self.database)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the file in a thread. Waits at most `DISK_TIMEOUT`; a thread that hangs on the disk closes it later."""
        database, self.database = self.database, None
        if database is not None:
            with trio.move_on_after(
                DISK_TIMEOUT, shield=True
            ):  # not by `_in_thread`: its one thread may hang in a write
                await trio.to_thread.run_sync(database.close, abandon_on_cancel=True)

    async def saved(self) -> None:
        """Wait until all changes so far are on disk, for at most `DISK_TIMEOUT`, and not where the disk has failed."""
        if self._healthy and self.database is not None and not self.idle:
            with trio.move_on_after(DISK_TIMEOUT) as scope:
                await (self._next_write if self._pending else self._current_write).wait()
            if scope.cancelled_caught:
                log.warning("disk is slow: a reservation was acknowledged before it was stored")

    def _on_change(self, holder: ReservationKey) -> None:
        if self.database is not None:
            self._pending.add(holder)
            self._changed.set()

    async def _write(self, database: Database) -> None:
        changes, everything = self._take_changes(), self._everything
        self._current_write, self._next_write = self._next_write, trio.Event()
        try:
            await self._in_thread(lambda: database.write(changes, everything=everything))
        except StoreError as error:
            self._everything = True
            if self._healthy:
                log.warning("could not store reservations: kept in memory until it succeeds", reason=str(error))
            self._healthy = False
        else:
            self._everything = False
            if not self._healthy:
                log.info("reservations are stored again", file=str(database.path))
            self._healthy = True
        finally:
            self._current_write.set()

    def _take_changes(self) -> list[Change]:
        holders, self._pending = self._pending, set()
        if self._everything:
            return [(record.holder, self._to_wall_clock(record)) for record in self._table]
        found = ((holder, self._table.find(holder)) for holder in holders)
        return [(holder, record and self._to_wall_clock(record)) for holder, record in found]

    def _to_wall_clock(self, record: Reservation) -> Reservation:
        """The record with `expires` in seconds since 1970 instead of Trio's time."""
        if record.expires is None:
            return record
        return replace(record, expires=self._clock() + record.expires - trio.current_time())

    def _from_wall_clock(self, records: Iterable[Reservation], max_seconds: float) -> Iterable[Reservation]:
        """The reverse, without expired records. A clock that was set back extends none beyond `max_seconds`."""
        now, wall = trio.current_time(), self._clock()
        for record in records:
            left = max_seconds if record.expires is None else min(record.expires - wall, max_seconds)
            if left > 0:
                yield replace(record, expires=now + left)

    def _log_unavailable(self, reason: str) -> None:
        log.warning("reservations are kept in memory only: a restart loses them", reason=reason)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the one thread of the store. It is abandoned where it hangs and the caller is cancelled."""
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._thread)


class _Opening:
    """Opens and reads the file in a thread, and closes it if nothing waits for that thread any more."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._abandoned = False

    def run(self) -> tuple[Database, list[Reservation], int]:
        """Return the open database, its reservations and the number of invalid rows. Raises `StoreError`."""
        database = Database(self._directory)
        try:
            records, invalid_rows = database.load()
        except BaseException:
            database.close()
            raise
        with self._lock:
            self._database = database
            if self._abandoned:
                database.close()
        return database, records, invalid_rows

    def abandon(self) -> None:
        """Close the file, now or as soon as it has been opened."""
        with self._lock:
            self._abandoned = True
            if self._database is not None:
                self._database.close()
