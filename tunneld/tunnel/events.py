"""The events of tunnels, as `watch` reports them.

    opened    a tunnel was opened                        id backend server client owner
    attached  a hidden server connected                  id from
    detached  it disconnected before a visitor arrived   id from
    visitor   a visitor was joined to the hidden server  id from
    left      that visitor's connection ended            id from up down reason
    refused   a connection was refused                   id from side reason
    draining  nothing new; connections may finish        id visitors
    closed    the tunnel has closed                      id reason visitors up down

Publishing never waits: a watcher that does not keep up loses events, and an event `lost` tells how many. Without
watchers, publishing costs one test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import trio

from tunneld.wire.lines import Item, Value


class Watcher:
    """One subscription: an asynchronous iterator over events, oldest first."""

    def __init__(self, backlog: int, wanted: Callable[[str], bool]) -> None:
        self._send, self._receive = trio.open_memory_channel[Item](backlog)
        self._wanted = wanted
        self._lost = 0

    def offer(self, event: Item) -> None:
        """Queue one event, or count it as lost where the backlog is full."""
        if not self._wanted(str(event.get("id", ""))):
            return
        try:
            if self._lost:
                self._send.send_nowait({"event": "lost", "count": self._lost})
                self._lost = 0
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._lost += 1

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Item:
        return await self._receive.receive()


class Events:
    """Where tunnels publish and watchers subscribe."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    @property
    def watched(self) -> bool:
        """Whether there is a watcher; check it before building an event on a hot path."""
        return bool(self._watchers)

    def publish(self, name: str, /, **fields: Value) -> None:
        """Offer an event to every watcher. Never waits, never raises."""
        if self._watchers:
            event: Item = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **fields}
            for watcher in self._watchers:
                watcher.offer(event)

    @asynccontextmanager
    async def watch(self, backlog: int, wanted: Callable[[str], bool] = lambda _id: True) -> AsyncIterator[Watcher]:
        """Subscribe for the length of the block to the events of tunnels where `wanted(id)` is true at the time
        of the event. `backlog` events are queued.
        """
        watcher = Watcher(backlog, wanted)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
