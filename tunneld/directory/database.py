"""The file of reservations. Everything here blocks: it is for a thread.

It is opened for this process alone (`locking_mode=EXCLUSIVE`), so two daemons never share one, and no memory is shared
with others. Every commit is on the disk when it returns (`synchronous=FULL`): what was acknowledged is there after a
power cut. Server URIs in it have keys, which are secrets: nobody else may read it.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunneld.errors import StoreError, UsageError, reason_of
from tunneld.net.endpoint import MAX_PORT, Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey

FILE = "reservations.db"
APPLICATION = 0x74756E6C
"""`tunl`, in the header of the file: SQLite's own way to tell whose a file is."""
VERSION = 1
BUSY = 2.0
"""Seconds for another process to let go of the file: a daemon that is just ending does so in less."""
MODE = 0o600
FOLDER_MODE = 0o700

SCHEMA = """
CREATE TABLE reservation (
    credential TEXT NOT NULL,  -- empty without credentials
    host TEXT NOT NULL,        -- the address that asked, or empty
    name TEXT NOT NULL,
    backend TEXT NOT NULL,
    client_port INTEGER NOT NULL,
    server TEXT NOT NULL,      -- the server URI with its key
    expires REAL,              -- seconds since 1970; NULL while the tunnel is open
    PRIMARY KEY (credential, host, name)
) WITHOUT ROWID
"""

Change = tuple[ReservationKey, Reservation | None]
"""What a holder has now. `expires` is in seconds since 1970 here."""


class Database:
    """An open file."""

    def __init__(self, folder: Path) -> None:
        """Open or make the file in `folder`, which is made where it is missing. A damaged one is put aside, which
        `damage` tells.

        Raises `StoreError` where there can be none: the reason, as a sentence for the log.
        """
        self.path = folder / FILE
        self.damage = ""
        self._in_use = threading.Lock()
        with _told(self.path):
            folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
            _make_private(self.path)
            try:
                self._connection = _open(self.path)
            except sqlite3.OperationalError:  # locked, read-only, full: nothing is wrong with what is in it
                raise
            except sqlite3.DatabaseError as error:
                self.damage = str(error)
                _put_aside(self.path)
                _make_private(self.path)
                self._connection = _open(self.path)

    def load(self) -> tuple[list[Reservation], int]:
        """All reservations, and how many rows are none. Raises `StoreError`."""
        with _told(self.path), self._in_use:
            rows = self._connection.execute("SELECT * FROM reservation ORDER BY expires").fetchall()
        records = [record for row in rows if (record := _record(row)) is not None]
        return records, len(rows) - len(records)

    def write(self, changes: Iterable[Change], *, everything: bool = False) -> None:
        """Make these changes, all or none; with `everything`, have nothing but them. Raises `StoreError`."""
        with _told(self.path), self._in_use:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                if everything:
                    self._connection.execute("DELETE FROM reservation")
                for holder, record in changes:
                    self._write(holder, record)
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # where SQLite has done so by itself
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file, when a read or write in another thread has ended. Once closed it stays closed."""
        with self._in_use:
            self._connection.close()

    def _write(self, holder: ReservationKey, record: Reservation | None) -> None:
        key = (holder.credential, holder.host, holder.name)
        if record is None:
            self._connection.execute("DELETE FROM reservation WHERE (credential, host, name) = (?, ?, ?)", key)
        else:
            row = (*key, record.backend, record.client_port, str(record.server), record.expires)
            self._connection.execute("INSERT OR REPLACE INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _open(path: Path) -> sqlite3.Connection:
    """Raises `sqlite3.Error`; `StoreError` for a file that is somebody else's."""
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version, tables) != (0, 0, 0):
            _check_whose(application, version)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")  # here it shows whether we may write, and are alone
        if not tables:
            connection.execute(SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_whose(application: int, version: int) -> None:
    if application != APPLICATION:
        raise StoreError("it is a database of another program; nothing in it was changed")
    if version != VERSION:
        raise StoreError(
            f"it has version {version}, and this tunneld knows {VERSION}; nothing in it was changed: use the tunneld "
            "that wrote it, or move it away"
        )


def _record(row: tuple[object, ...]) -> Reservation | None:
    """A row that somebody else may have edited."""
    match row:
        case (str(credential), str(host), str(name), str(backend), int(port), str(server), float() | None as expires):
            with suppress(UsageError):
                if 1 <= port <= MAX_PORT:
                    return Reservation(
                        ReservationKey(credential, name, host), backend, port, Endpoint.parse(server), expires
                    )
    return None


def _make_private(path: Path) -> None:
    """SQLite gives the files beside this one the same mode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & ~MODE:
            os.fchmod(descriptor, MODE)
    finally:
        os.close(descriptor)


def _put_aside(path: Path) -> None:
    """For a person to look at; one that was put aside earlier goes."""
    for suffix in ("", "-wal", "-journal"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{path}.damaged{suffix}")  # noqa: PTH105 - two names made of one


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Every reason as a `StoreError` that names the file."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except sqlite3.Error as error:
        reason = "another process uses it" if "locked" in str(error) else str(error)
        raise StoreError(f"{path}: {reason}") from None
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {reason_of(error)}") from None
