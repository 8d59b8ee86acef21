"""The exchanges that are kept: the newest ones, within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from tunneld.inspector.records import Exchange
from tunneld.inspector.settings import InspectorLimits


@dataclass(slots=True, eq=False)
class StoreWatch:
    """The ids of exchanges that have changed since a page has looked; never more than the store has."""

    changed: set[int] = field(default_factory=set)
    event: trio.Event = field(default_factory=trio.Event)

    async def wait(self) -> set[int]:
        """Wait for a change; returns the ids since the last call."""
        await self.event.wait()
        self.event = trio.Event()
        found, self.changed = self.changed, set()
        return found


class ExchangeStore:
    """Exchanges by id, in the order of their requests. The oldest is dropped when there are too many."""

    def __init__(self, limits: InspectorLimits) -> None:
        self.limits = limits
        self.kept = 0
        """Bytes that the exchanges cost."""
        self.dropped = 0
        """Exchanges that were dropped for newer ones."""
        self.inflaters = 0
        """Directions of WebSockets that are being decompressed."""
        self._exchanges: dict[int, Exchange] = {}
        self._watches: list[StoreWatch] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._exchanges)

    def __iter__(self) -> Iterator[Exchange]:
        """All exchanges, the oldest first."""
        return iter(self._exchanges.values())

    def __contains__(self, number: int) -> bool:
        return number in self._exchanges

    def get(self, number: int) -> Exchange | None:
        """The exchange with this id."""
        return self._exchanges.get(number)

    def new(self, exposure: str, visitor: str, began: float, replay_of: int | None = None) -> Exchange:
        """Add an exchange."""
        self._last += 1
        made = Exchange(self._last, exposure, visitor, began, replay_of=replay_of)
        self._exchanges[made.id] = made
        self.kept += made.cost
        self._fit()
        self.changed(made)
        return made

    def charge(self, exchange: Exchange, count: int) -> None:
        """The exchange keeps `count` more bytes, or fewer."""
        if exchange.is_kept:
            exchange.cost += count
            self.kept += count
            self._fit()

    def changed(self, exchange: Exchange) -> None:
        """Tell the pages, once each of them looks."""
        if exchange.is_kept:
            for watch in self._watches:
                watch.changed.add(exchange.id)
                watch.event.set()

    def clear(self) -> None:
        """Drop all exchanges."""
        while self._exchanges:
            self._drop_oldest()
        for watch in self._watches:
            watch.event.set()

    @contextmanager
    def watching(self) -> Iterator[StoreWatch]:
        """Watch for changes during the block."""
        watch = StoreWatch()
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def _fit(self) -> None:
        while self._exchanges and (self.kept > self.limits.memory or len(self._exchanges) > self.limits.exchanges):
            self._drop_oldest()
            self.dropped += 1

    def _drop_oldest(self) -> None:
        oldest = self._exchanges.pop(next(iter(self._exchanges)))
        oldest.is_kept = False
        self.kept -= oldest.cost
        oldest.frames.clear()
        for message in (oldest.request, oldest.response):
            if message is not None:
                message.body = bytearray()
        for watch in self._watches:
            watch.changed.discard(oldest.id)
            watch.event.set()
