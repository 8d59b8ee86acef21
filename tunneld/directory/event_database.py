"""The file of past events, an SQLite database. Every call blocks and belongs in a thread.

The last second of events may be missing after a power cut; after a restart or a crash nothing is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunneld.directory.sqlite_file import FileFormat, SqliteFile
from tunneld.wire.lines import Item

FILE_NAME = "events.db"
APPLICATION_ID = 0x74756E65
"""`tune`: tunneld's events."""
SCHEMA = (
    """
CREATE TABLE event (
    number INTEGER PRIMARY KEY,  -- in the order of publication
    time REAL NOT NULL,          -- seconds since 1970
    owner TEXT,                  -- the credential that may see it; NULL: credentials that see everything
    tunnel TEXT,                 -- the id of its tunnel
    name TEXT,                   -- the name of its tunnel
    of_visitor INTEGER NOT NULL, -- whether it is about a connection, of which there may be many
    fields TEXT NOT NULL         -- JSON
)
""",
    "CREATE INDEX event_by_kind ON event (of_visitor, number)",
)
LOCK_TIMEOUT = 0.25
"""Seconds to wait for another process: the start of the relay waits as long, and can do without past events."""
PAGE = 256
"""Events that are read together: a page costs a millisecond."""


@dataclass(frozen=True, slots=True)
class PastEvent:
    """One event."""

    number: int
    time: float  # seconds since 1970
    owner: str | None
    tunnel: str | None
    name: str | None
    of_visitor: bool
    item: Item


@dataclass(frozen=True, slots=True)
class EventQuery:
    """Which events are wanted."""

    since: float  # seconds since 1970
    owner: str | None = None  # the credential that asks; None: it may see all
    tunnel: str = ""  # id of a tunnel, open since `opened`; empty: of all
    opened: float = 0.0  # ids are used again after a restart
    name: str = ""  # of the tunnel; its earlier tunnels are wanted, too
    name_owner: str | None = None  # of this credential

    def matches(self, event: PastEvent) -> bool:
        """Whether this event is one of them."""
        if event.time < self.since or (self.owner is not None and event.owner != self.owner):
            return False
        if not self.tunnel and not self.name:
            return True
        if self.tunnel and event.tunnel == self.tunnel and event.time >= self.opened:
            return True
        return bool(self.name) and event.name == self.name and self.name_owner in {None, event.owner}

    @property
    def condition(self) -> tuple[str, dict[str, object]]:
        """The same for SQLite, with its parameters."""
        parts, values = ["time >= :since"], {name: getattr(self, name) for name in self.__slots__}
        if self.owner is not None:
            parts.append("owner = :owner")
        if self.tunnel or self.name:
            by_id = "(:tunnel <> '' AND tunnel = :tunnel AND time >= :opened)"
            by_name = "(:name <> '' AND name = :name AND (:name_owner IS NULL OR owner = :name_owner))"
            parts.append(f"({by_id} OR {by_name})")
        return " AND ".join(parts), values


class EventDatabase(SqliteFile):
    """An open database file."""

    def __init__(self, directory: Path) -> None:
        """Open or create the file in `directory`, see `SqliteFile`. Raises `StoreError`."""
        form = FileFormat(APPLICATION_ID, 1, SCHEMA, {}, LOCK_TIMEOUT, synchronous="NORMAL")
        super().__init__(directory / FILE_NAME, form)

    def last_number(self) -> int:
        """The number of the newest event; 0: there is none. Raises `StoreError`."""
        with self.reading() as connection:
            (number,) = connection.execute("SELECT coalesce(max(number), 0) FROM event").fetchone()
        return int(number)

    def add(self, events: Sequence[PastEvent]) -> None:
        """Add events. Raises `StoreError`."""
        rows = [
            (one.number, one.time, one.owner, one.tunnel, one.name, one.of_visitor, json.dumps(one.item))
            for one in events
        ]
        with self.transaction() as connection:
            connection.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def trim(self, before: float, keep: int) -> None:
        """Delete events from before this time, and the oldest beyond `keep`, of either kind. Raises `StoreError`."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM event WHERE time < ?", (before,))
            for of_visitor in (False, True):
                connection.execute(
                    "DELETE FROM event WHERE of_visitor = :kind AND number <= (SELECT number FROM event "
                    "WHERE of_visitor = :kind ORDER BY number DESC LIMIT 1 OFFSET :keep)",
                    {"kind": of_visitor, "keep": keep},
                )

    def read(self, query: EventQuery, after: int, until: int) -> tuple[Sequence[Item], int]:
        """The next page of events with numbers above `after` and up to `until`, oldest first, and the number to go on
        after. Raises `StoreError`.
        """
        condition, values = query.condition
        values |= {"after": after, "until": until, "page": PAGE}
        sql = f"SELECT number, fields FROM event WHERE number > :after AND number <= :until AND {condition}"
        with self.reading() as connection:
            rows = connection.execute(f"{sql} ORDER BY number LIMIT :page", values).fetchall()
        return [json.loads(fields) for _, fields in rows], rows[-1][0] if len(rows) == PAGE else until
