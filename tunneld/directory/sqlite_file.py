"""A private SQLite file of the relay: opened, checked, converted and locked. Every call blocks and belongs in a thread.

The file is locked for this process (`locking_mode=EXCLUSIVE`), so two daemons never share one, and SQLite needs no
shared memory. Only its owner may read it.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tunneld.errors import StoreError, reason_of

LOCK_TIMEOUT = 2.0
"""Seconds to wait for another process to release the file: a daemon that is just ending takes less."""
FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


@dataclass(frozen=True, slots=True)
class FileFormat:
    """What a file is: SQLite's own mark of the program that it belongs to, its version, and how it is made."""

    application_id: int
    version: int
    schema: Sequence[str]  # the statements for a new file
    conversions: Mapping[int, Sequence[str]]  # the statements for a file of an earlier version
    lock_timeout: float | None = None  # seconds; None: LOCK_TIMEOUT
    synchronous: str = "FULL"  # a commit is on disk when it returns; NORMAL: it may be lost in a power cut


class SqliteFile:
    """An open database file."""

    def __init__(self, path: Path, form: FileFormat) -> None:
        """Open or create the file, and its folder. A damaged file is moved aside; `damage` has the reason then.

        Raises `StoreError` with the path and the reason.
        """
        self.path = path
        self.damage = ""
        self._lock = threading.Lock()
        with store_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=DIRECTORY_MODE)
            _make_private(path)
            try:
                self.connection = _open(path, form)
            except sqlite3.OperationalError:  # locked, read-only or full: its content is not damaged
                raise
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's own message may have damaged text
                self.damage = str(error)
                _move_aside(path)
                _make_private(path)
                self.connection = _open(path, form)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read in the block, alone. Raises `StoreError`."""
        with store_errors(self.path), self._lock:
            yield self.connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in the block, all or nothing. Raises `StoreError`."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file once a read or write in another thread has ended. Idempotent."""
        with self._lock:
            self.connection.close()


def _open(path: Path, form: FileFormat) -> sqlite3.Connection:
    """Open, check and lock the file. Raises `sqlite3.Error`, or `StoreError` for a file in another format."""
    timeout = LOCK_TIMEOUT if form.lock_timeout is None else form.lock_timeout
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version, tables) != (0, 0, 0):
            _check_format(form, application, version)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {form.synchronous}")
        connection.execute("BEGIN IMMEDIATE")  # fails where the file is read-only or locked
        if version != form.version:
            for statement in form.conversions[version] if tables else form.schema:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {form.application_id}")
            connection.execute(f"PRAGMA user_version = {form.version}")
        connection.execute("COMMIT")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_format(form: FileFormat, application: int, version: int) -> None:
    if application != form.application_id:
        raise StoreError(
            "the database belongs to another program and was not changed: move it away, or set daemon.state"
        )
    if version not in {*form.conversions, form.version}:
        raise StoreError(
            f"its format version is {version}, and this tunneld supports {form.version}; it was not changed: use the "
            "tunneld that wrote it, or move it away"
        )


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
def store_errors(path: Path) -> Iterator[None]:
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
