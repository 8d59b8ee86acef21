"""The file of reservations, an SQLite database. Every call blocks and belongs in a thread.

The file is locked for this process (`locking_mode=EXCLUSIVE`), so two daemons never share one, and SQLite needs no
shared memory. A commit is on disk when it returns (`synchronous=FULL`): what was acknowledged survives a power cut.
Server URIs in the file have keys, which are secrets, so only its owner may read it.
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
from tunneld.net.address import parse_address
from tunneld.net.endpoint import Endpoint
from tunneld.policy.reservations import Reservation, ReservationKey

FILE_NAME = "reservations.db"
APPLICATION_ID = 0x74756E6C
"""`tunl`, in the header of the file: SQLite's own mark of the program that a file belongs to."""
FORMAT_VERSION = 2
"""1: one public port per tunnel, in a column `client_port`. 2: any public addresses. A file of version 1 is converted
when it is opened. A file of a version newer than this is not changed, and reservations are kept in memory then.
"""
LOCK_TIMEOUT = 2.0
"""Seconds to wait for another process to release the file: a daemon that is just ending takes less."""
FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

SCHEMA = """
CREATE TABLE reservation (
    credential TEXT NOT NULL,  -- empty without credentials
    host TEXT NOT NULL,        -- the requester's address, or empty
    name TEXT NOT NULL,
    backend TEXT NOT NULL,
    addresses TEXT NOT NULL,   -- public ones, separated by blanks: 20080 blog.example.org
    server TEXT NOT NULL,      -- the server URI with its key
    expires REAL,              -- seconds since 1970; NULL while the tunnel is open
    metered INTEGER NOT NULL,  -- bytes that count against the quota
    PRIMARY KEY (credential, host, name)
) WITHOUT ROWID
"""

FROM_VERSION_1 = (
    "ALTER TABLE reservation RENAME TO reservation_1",
    SCHEMA,
    """INSERT INTO reservation SELECT credential, host, name, backend, CAST(client_port AS TEXT), server, expires, 0
    FROM reservation_1""",
    "DROP TABLE reservation_1",
)
"""Converts a file of version 1."""

Change = tuple[ReservationKey, Reservation | None]
"""A holder and its reservation now. `expires` is in seconds since 1970 here."""


class Database:
    """An open database file."""

    def __init__(self, directory: Path) -> None:
        """Open or create the file in `directory`, which is created where it is missing. A damaged file is moved aside;
        `damage` has the reason then.

        Raises `StoreError` with the path and the reason.
        """
        self.path = directory / FILE_NAME
        self.damage = ""
        self._lock = threading.Lock()
        with _store_errors(self.path):
            directory.mkdir(parents=True, exist_ok=True, mode=DIRECTORY_MODE)
            _make_private(self.path)
            try:
                self._connection = _open(self.path)
            except sqlite3.OperationalError:  # locked, read-only or full: its content is not damaged
                raise
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's own message may have damaged text
                self.damage = str(error)
                _move_aside(self.path)
                _make_private(self.path)
                self._connection = _open(self.path)

    def load(self) -> tuple[list[Reservation], int]:
        """All reservations, and the number of invalid rows. Raises `StoreError`."""
        with _store_errors(self.path), self._lock:
            rows = self._connection.execute("SELECT * FROM reservation ORDER BY expires").fetchall()
        records = [record for row in rows if (record := _record(row)) is not None]
        return records, len(rows) - len(records)

    def write(self, changes: Iterable[Change], *, everything: bool = False) -> None:
        """Apply these changes in one transaction. With `everything`, they replace the whole content. Raises
        `StoreError`.
        """
        with _store_errors(self.path), self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                if everything:
                    self._connection.execute("DELETE FROM reservation")
                for holder, record in changes:
                    self._write(holder, record)
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file once a read or write in another thread has ended. Idempotent."""
        with self._lock:
            self._connection.close()

    def _write(self, holder: ReservationKey, record: Reservation | None) -> None:
        key = (holder.credential, holder.host, holder.name)
        if record is None:
            self._connection.execute("DELETE FROM reservation WHERE (credential, host, name) = (?, ?, ?)", key)
        else:
            addresses = " ".join(map(str, record.addresses))
            row = (*key, record.backend, addresses, str(record.server), record.expires, record.metered)
            self._connection.execute("INSERT OR REPLACE INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def _open(path: Path) -> sqlite3.Connection:
    """Open, check and lock the file. Raises `sqlite3.Error`, or `StoreError` for a file in another format."""
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version, tables) != (0, 0, 0):
            _check_format(application, version)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")  # fails where the file is read-only or locked
        if version != FORMAT_VERSION:
            for statement in FROM_VERSION_1 if tables else (SCHEMA,):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_format(application: int, version: int) -> None:
    if application != APPLICATION_ID:
        raise StoreError(
            "the database belongs to another program and was not changed: move it away, or set daemon.state"
        )
    if version not in {1, FORMAT_VERSION}:
        raise StoreError(
            f"its format version is {version}, and this tunneld supports {FORMAT_VERSION}; it was not changed: use the "
            "tunneld that wrote it, or move it away"
        )


def _record(row: tuple[object, ...]) -> Reservation | None:
    """The reservation in a row, or None: an administrator may have edited the file."""
    match row:
        case (
            str(credential),
            str(host),
            str(name),
            str(backend),
            str(public),
            str(server),
            float() | None as expires,
            int(metered),
        ):
            with suppress(UsageError):
                addresses = tuple(map(parse_address, public.split()))
                holder = ReservationKey(credential, name, host)
                return Reservation(holder, backend, addresses, Endpoint.parse(server), expires, metered)
    return None


def _make_private(path: Path) -> None:
    """Create the file, or restrict its mode; SQLite gives its journal files the same one. Links are not followed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & ~FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
    finally:
        os.close(descriptor)


def _move_aside(path: Path) -> None:
    """Rename the file for inspection, over one that was moved aside before."""
    for suffix in ("", "-wal", "-journal"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{path}.damaged{suffix}")  # noqa: PTH105 - two names from one


@contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    """Turn errors into `StoreError` with the path and the reason."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except sqlite3.Error as error:
        reason = "in use by another process" if "locked" in str(error) else str(error)
        raise StoreError(f"{path}: {reason}") from None
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: damaged: {error}") from None
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {reason_of(error)}") from None
