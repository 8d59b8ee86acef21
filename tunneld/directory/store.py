"""The task that keeps the book of reservations on disk.

    changed ──► pending ──► one transaction in a thread ──► saved
                   ▲                     │ failed: said once, and everything is written at the next attempt
                   └─────────────────────┘

The scheduler never waits for a disk. Whoever opens a tunnel does, for `PATIENCE` at most: the answer says that the
address is reserved. All that changes while the disk is busy goes into the next transaction, so a hundred tunnels that
come back at once cost a few writes and not a hundred. Nothing here ever stops the daemon from serving.
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

PATIENCE = 2.0
"""Seconds that an opening waits for the disk, and a start for the file: far above what a working one takes."""
RETRY = 30.0
"""Seconds until a write that failed is tried again, if nothing changes before: somebody may have made room."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("store")
T = TypeVar("T")


class ReservationStore:
    """Keeps a book on disk, where there is one."""

    def __init__(self, book: ReservationTable, folder: Path | None, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since 1970."""
        self._book = book
        self._folder = folder
        self._clock = clock
        self._database: Database | None = None
        self._pending: set[ReservationKey] = set()
        self._everything = False  # what the file holds is not known: write all there is
        self._well = True
        self._stirred = trio.Event()
        self._batch = trio.Event()  # set when what is pending is on disk, or will not be
        self._in_hand = trio.Event()  # the same of what is being written
        self._in_hand.set()
        self._thread = trio.CapacityLimiter(1)

    @property
    def place(self) -> str:
        """Where reservations are kept, for `status`."""
        return str(self._database.path) if self._database is not None and self._well else "memory"

    async def open(self, kept_for: float) -> None:
        """Open the file and fill the book from it. What was open when the daemon ended, and what was away, is reserved
        for `kept_for` seconds at most from now. Without a file it says why and goes on in memory.
        """
        try:
            if self._folder is None:
                raise StoreError("there is no place for a file: name one with daemon.state")
            opening = _Opening(self._folder)
            try:
                with trio.fail_after(PATIENCE * 2):
                    database, records, spoiled = await self._do(opening.run)
            except BaseException:
                opening.abandon()
                raise
        except trio.TooSlowError:
            self._complain(f"{self._folder}: no answer in {PATIENCE * 2:g} s")
        except StoreError as error:
            self._complain(str(error))
        else:
            self._database = database
            if database.damage:
                log.error(
                    "file of reservations was damaged: put aside, begun anew",
                    damage=database.damage,
                    aside=f"{database.path}.damaged",
                )
            if spoiled:
                log.warning("file of reservations has rows that are none", rows=spoiled)
            self._book.load(self._dated(records, kept_for))
            self._everything = True  # with the times of those that were open, and without those whose time is over
            self._stirred.set()
            log.info("reservations kept", file=str(database.path), count=len(self._book))
        self._book.changed = self._changed

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what changes until cancelled, then close the file."""
        try:
            task_status.started()
            while self._database is not None:
                with trio.move_on_after(math.inf if self._well else RETRY):
                    await self._stirred.wait()
                self._stirred = trio.Event()
                await self._write(self._database)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the file in a thread. Waits `PATIENCE` at most: a thread that hangs on the disk closes it later."""
        database, self._database = self._database, None
        if database is not None:
            with trio.move_on_after(PATIENCE, shield=True):  # not by `_do`, whose one thread may hang in a write
                await trio.to_thread.run_sync(database.close, abandon_on_cancel=True)

    async def saved(self) -> None:
        """Wait until all that changed so far is on disk; not for ever, and not for one that does not work."""
        if self._well and self._database is not None:
            with trio.move_on_after(PATIENCE) as scope:
                await (self._batch if self._pending else self._in_hand).wait()
            if scope.cancelled_caught:
                log.warning("disk is slow: a reservation was acknowledged before it was stored")

    # Inside

    def _changed(self, holder: ReservationKey) -> None:
        if self._database is not None:
            self._pending.add(holder)
            self._stirred.set()

    async def _write(self, database: Database) -> None:
        changes, everything = self._take(), self._everything
        self._in_hand, self._batch = self._batch, trio.Event()
        try:
            await self._do(lambda: database.write(changes, everything=everything))
        except StoreError as error:
            self._everything = True
            if self._well:
                log.warning("could not store reservations: kept in memory until it can", reason=str(error))
            self._well = False
        else:
            self._everything = False
            if not self._well:
                log.info("reservations are stored again", file=str(database.path))
            self._well = True
        finally:
            self._in_hand.set()

    def _take(self) -> list[Change]:
        holders, self._pending = self._pending, set()
        if self._everything:
            return [(record.holder, self._on_the_wall(record)) for record in self._book]
        found = ((holder, self._book.find(holder)) for holder in holders)
        return [(holder, record and self._on_the_wall(record)) for holder, record in found]

    def _on_the_wall(self, record: Reservation) -> Reservation:
        """From the scheduler's clock to the one that outlives us."""
        if record.expires is None:
            return record
        return replace(record, expires=self._clock() + record.expires - trio.current_time())

    def _dated(self, records: Iterable[Reservation], kept_for: float) -> Iterable[Reservation]:
        """The other way. A clock that was set back meanwhile makes nothing last longer than it may."""
        now, wall = trio.current_time(), self._clock()
        for record in records:
            left = kept_for if record.expires is None else min(record.expires - wall, kept_for)
            if left > 0:
                yield replace(record, expires=now + left)

    def _complain(self, reason: str) -> None:
        log.warning("reservations are kept in memory only: a restart forgets them", reason=reason)

    async def _do(self, work: Callable[[], T]) -> T:
        """In a thread, which is left behind where it hangs and we are to end."""
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._thread)


class _Opening:
    """Opens and reads the file in a thread, and closes it if nothing waits for that thread any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._abandoned = False

    def run(self) -> tuple[Database, list[Reservation], int]:
        """Raises `StoreError`."""
        database = Database(self._folder)
        try:
            records, spoiled = database.load()
        except BaseException:
            database.close()
            raise
        with self._lock:
            self._database = database
            if self._abandoned:
                database.close()
        return database, records, spoiled

    def abandon(self) -> None:
        """The result is not wanted: close the file, now or when it has been opened."""
        with self._lock:
            self._abandoned = True
            if self._database is not None:
                self._database.close()
