"""The file of reservations, an SQLite database. Every call blocks and belongs in a thread.

A commit is on disk when it returns: what was acknowledged survives a power cut. Server URIs in the file have keys,
which are secrets.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tunneld.directory.sqlite_file import FileFormat, SqliteFile
from tunneld.errors import UsageError
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


class Database(SqliteFile):
    """An open database file."""

    def __init__(self, directory: Path) -> None:
        """Open or create the file in `directory`, see `SqliteFile`. Raises `StoreError`."""
        conversions = {1: FROM_VERSION_1}
        super().__init__(directory / FILE_NAME, FileFormat(APPLICATION_ID, FORMAT_VERSION, (SCHEMA,), conversions))

    def load(self) -> tuple[list[Reservation], int]:
        """All reservations, and the number of invalid rows. Raises `StoreError`."""
        with self.reading() as connection:
            rows = connection.execute("SELECT * FROM reservation ORDER BY expires").fetchall()
        records = [record for row in rows if (record := _record(row)) is not None]
        return records, len(rows) - len(records)

    def write(self, changes: Iterable[Change], *, everything: bool = False) -> None:
        """Apply these changes in one transaction. With `everything`, they replace the whole content. Raises
        `StoreError`.
        """
        with self.transaction() as connection:
            if everything:
                connection.execute("DELETE FROM reservation")
            for holder, record in changes:
                _write(connection, holder, record)


def _write(connection: sqlite3.Connection, holder: ReservationKey, record: Reservation | None) -> None:
    key = (holder.credential, holder.host, holder.name)
    if record is None:
        connection.execute("DELETE FROM reservation WHERE (credential, host, name) = (?, ?, ?)", key)
    else:
        addresses = " ".join(map(str, record.addresses))
        row = (*key, record.backend, addresses, str(record.server), record.expires, record.metered)
        connection.execute("INSERT OR REPLACE INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


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
