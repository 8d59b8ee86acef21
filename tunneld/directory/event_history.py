"""Keeps the events of tunnels for `watch since=...`, in a file beside the reservations.

    published ──► pending ──► one transaction a second, in a thread ──► stored

The event loop never waits for the disk. Events of visitors and server connections are kept at a limited rate: beyond
it they are counted, and an event `lost` takes their place. Both bounds, number and age, hold for them and for all other
events by themselves, so that a flood of visitors displaces nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
import trio

from tunneld.directory.event_database import EventDatabase, EventQuery, PastEvent
from tunneld.errors import StoreError
from tunneld.tunnel.events import Events
from tunneld.wire.lines import Item

VISITOR_EVENTS = frozenset({"visitor", "left", "refused", "attached", "detached"})
"""Events about connections, of which there may be thousands in a second."""
VISITOR_EVENTS_PER_WRITE = 200
"""Of these, how many are kept between two writes, which are a second apart: to make and store one costs 20 µs, so 200
cost half a percent of a processor.
"""
WRITE_INTERVAL = 1.0
"""Seconds between two writes."""
TRIM_INTERVAL = 60.0
"""Seconds between two deletions of old events; between them the file grows beyond its bounds."""
MAX_PENDING = 10_000
"""Events that wait for a disk that does not answer, at about 500 bytes each."""
OPENING_SECONDS = 4.0
"""For the file, when the relay starts: far above what a working disk takes."""
CLOSING_SECONDS = 2.0
"""For the last events, when the relay stops."""

NOT_KEPT = "events are not kept, so watch has no past ones"

log: structlog.stdlib.BoundLogger = structlog.get_logger("events")
T = TypeVar("T")


class EventSettings(Protocol):
    """What is read of `[events]`."""

    @property
    def max_kept(self) -> int: ...
    @property
    def max_age(self) -> float: ...
    @property
    def connections(self) -> bool: ...


class EventHistory:
    """The past events of one relay. Implements `EventKeeper`."""

    def __init__(
        self,
        settings: Callable[[], EventSettings],
        directory: Path | None,
        events: Events,
        name_of: Callable[[str], str | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`directory` is the one of the file; None: no event is kept. `name_of` returns the name of the tunnel with an
        id; `clock` seconds since 1970.
        """
        self.lost = 0  # events that could not be stored
        self._settings = settings
        self._directory = directory
        self._events = events
        self._name_of = name_of
        self._clock = clock
        self._database: EventDatabase | None = None
        self._pending: list[PastEvent] = []
        self._last = 0  # the number of the newest event
        self._stored = 0  # up to this number they are in the file
        self._left = VISITOR_EVENTS_PER_WRITE
        self._unseen = 0  # what `Events.unseen` was at the last write
        self._skipped = 0  # events of visitors since then that are not kept
        self._healthy = True
        self._changed = trio.Event()
        self._writing = trio.Lock()

    @property
    def is_kept(self) -> bool:
        """Whether events are kept."""
        return self._database is not None and self._settings().max_kept > 0

    @property
    def wants_visitors(self) -> bool:
        """See `EventKeeper.wants_visitors`."""
        return self._left > 0 and self.is_kept and self._settings().connections

    def keep(self, event: Item, owner: str | None) -> None:
        """See `EventKeeper.keep`."""
        if not self.is_kept:
            return
        of_visitor = event["event"] in VISITOR_EVENTS
        if of_visitor and not self.wants_visitors:
            self._skipped += 1
            return
        self._left -= of_visitor
        self._append(event, owner, of_visitor=of_visitor)

    def _append(self, event: Item, owner: str | None, *, of_visitor: bool) -> None:
        if len(self._pending) >= MAX_PENDING:
            self.lost += 1
            return
        self._last += 1
        tunnel = event.get("id")
        text = None if tunnel is None else str(tunnel)
        name = self._name_of(text) if text is not None else None
        self._pending.append(PastEvent(self._last, self._clock(), owner, text, name, of_visitor, event))
        self._changed.set()

    def reconfigure(self) -> None:
        """The settings may have changed."""
        self._skipped, self._unseen = 0, self._events.unseen
        self._events.refresh_watched()

    # Reading

    def reader(self, query: EventQuery) -> EventReader:
        """Read the past events that are wanted."""
        return EventReader(self, query)

    async def read(self, query: EventQuery, after: int) -> tuple[Sequence[Item], int]:
        """The next events after a number, and the number to go on after. Without any, it returns at once: a watcher
        that is added before the next await misses none.
        """
        while self._database is not None and after < self._stored:
            database, stored = self._database, self._stored
            items, after = await self._in_thread(lambda: database.read(query, after, stored))  # noqa: B023 - awaited
            if items:
                return items, after
        return [one.item for one in self._pending if one.number > after and query.matches(one)], self._last

    # Writing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep events until cancelled, then store the last ones."""
        with trio.move_on_after(OPENING_SECONDS) as opening:
            await self._open()
        if opening.cancelled_caught:
            log.warning(NOT_KEPT, reason=f"no answer of the disk within {OPENING_SECONDS:g} s")
        self._unseen = self._events.unseen
        self._events.keep_in(self)
        task_status.started()
        try:
            trimmed_at = trio.current_time()
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self.flush()
                if trio.current_time() - trimmed_at >= TRIM_INTERVAL:
                    await self._trim()
                    trimmed_at = trio.current_time()
                await trio.sleep(WRITE_INTERVAL)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSING_SECONDS):
                await self.flush()
                if self._database is not None:
                    await trio.to_thread.run_sync(self._database.close, abandon_on_cancel=True)

    async def flush(self) -> None:
        """Store what there is."""
        async with self._writing:
            self._count_skipped()
            self._left = VISITOR_EVENTS_PER_WRITE
            self._events.refresh_watched()
            database, events = self._database, list(self._pending)
            if database is None or not events:
                return
            try:
                await self._in_thread(lambda: database.add(events))
            except StoreError as error:
                if self._healthy:
                    log.warning("could not store events: kept in memory until it succeeds", reason=str(error))
                self._healthy = False
                self._changed.set()  # try again
            else:
                self._healthy = True
                del self._pending[: len(events)]
                self._stored = events[-1].number

    def _count_skipped(self) -> None:
        """Note how many events of visitors are missing here: they were not kept, or not even made."""
        missing = self._skipped + self._events.unseen - self._unseen
        self._skipped, self._unseen = 0, self._events.unseen
        if missing and self.is_kept and self._settings().connections:
            self._append(self._events.make("lost", count=missing), None, of_visitor=True)

    async def _open(self) -> None:
        directory = self._directory
        if directory is None:
            return
        try:
            database = await self._in_thread(lambda: EventDatabase(directory))
            self._last = self._stored = await self._in_thread(database.last_number)
        except StoreError as error:
            log.warning(NOT_KEPT, reason=str(error))
            return
        if database.damage:
            log.error("events file was damaged: moved aside, started empty", damage=database.damage)
        self._database = database
        await self._trim()

    async def _trim(self) -> None:
        database, settings = self._database, self._settings()
        if database is not None:
            try:
                before = self._clock() - settings.max_age
                await self._in_thread(lambda: database.trim(before, settings.max_kept))
            except StoreError as error:
                log.warning("could not delete old events", reason=str(error))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


class EventReader:
    """Reads past events in pages, up to the present."""

    def __init__(self, history: EventHistory, query: EventQuery) -> None:
        self._history = history
        self._query = query
        self._after = 0

    async def next_page(self) -> Sequence[Item]:
        """The next events, oldest first; none: that was all, see `EventHistory.read`. Raises `StoreError`."""
        items, self._after = await self._history.read(self._query, self._after)
        return items
