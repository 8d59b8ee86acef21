"""The events of tunnels, as `watch` reports them.

    opened       a tunnel was opened                         id backend server client owner
    attached     a hidden server connected                   id from
    detached     it disconnected before a visitor arrived    id from
    visitor      a visitor was joined to the hidden server   id from
    left         that visitor's connection ended             id from up down reason
    refused      a connection was refused                    id from side reason
    certificate  an order of a certificate failed            id host reason
    draining     nothing new; connections may finish         id visitors
    closed       the tunnel has closed                       id reason visitors up down

Publishing never waits: a watcher that does not keep up loses events, and an event `lost` tells how many. Without a
watcher that may see a tunnel, publishing an event of it costs two look-ups: watchers are kept by the credential whose
tunnels they see. Their grants are read when they subscribe and after each reload.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import trio

from tunneld.errors import LimitReachedError
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.wire.lines import Item, Value, format_item

if TYPE_CHECKING:
    from tunneld.tunnel.spec import TunnelSpec
    from tunneld.tunnel.visitor import RelayedVisitor

MAX_EVENTS_AT_ONCE = 64
"""Events that a watcher returns together: what fits into one write."""

EVERYTHING = object()
"""The key of watchers that see all tunnels."""


class VisitorRecorder(Protocol):
    """Records a visitor of a tunnel that has left: bytes to and from the hidden server, and why it left."""

    def __call__(self, spec: TunnelSpec, visitor: RelayedVisitor, up: int, down: int, reason: str) -> None: ...


class EventKeeper(Protocol):
    """Keeps events for later."""

    @property
    def wants_visitors(self) -> bool:
        """Whether it keeps events of visitors at the moment."""

    def keep(self, event: Event, owner: str | None) -> None:
        """Keep an event; `owner` is the credential of its tunnel."""


class Event(dict[str, Value]):
    """One event. All watchers get the same object, and its line is formatted once."""

    _line: bytes | None = None

    @property
    def line(self) -> bytes:
        """The event as a line of the control protocol."""
        if self._line is None:
            self._line = format_item(self)
        return self._line


class Watcher:
    """One subscription: an asynchronous iterator over groups of events, oldest first. Ends when its credential is
    removed.
    """

    def __init__(self, backlog: int, grant: Callable[[], Grant | None], tunnel: str | None) -> None:
        """`grant` returns the grant in force; None: the credential was removed. `tunnel` is the id of the only tunnel
        that is wanted.
        """
        self.grant = grant
        self.key: object = None  # in the index of `Events`
        self.credential = ""  # the name of its credential
        self._send, self._receive = trio.open_memory_channel[Item](backlog)
        self._tunnel = tunnel
        self._lost = 0

    def offer(self, event: Event) -> None:
        """Queue one event, or count it as lost where the backlog is full."""
        if self._tunnel is not None and event.get("id") != self._tunnel:
            return
        try:
            if self._lost:
                self._send.send_nowait({"event": "lost", "count": self._lost})
                self._lost = 0
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._lost += 1

    def end(self) -> None:
        """There is nothing more for this watcher."""
        self._send.close()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Sequence[Item]:
        try:
            events = [await self._receive.receive()]
            while len(events) < MAX_EVENTS_AT_ONCE:
                events.append(self._receive.receive_nowait())
        except trio.WouldBlock:
            pass
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        return events


class Events:
    """Where tunnels publish and watchers subscribe."""

    def __init__(self, owner_of: Callable[[str], str | None] = lambda _tunnel: None) -> None:
        """`owner_of` returns the credential of the tunnel with an id."""
        self.recorder: VisitorRecorder | None = None  # of visitors that have left
        self.watched = False  # whether events of visitors are wanted: look before you build one on a hot path
        self.unseen = 0  # events that were not built, because they were not
        self._owner_of = owner_of
        self._watchers: dict[object, set[Watcher]] = {}  # by `EVERYTHING`, or by credential
        self._keeper: EventKeeper | None = None

    def publish(self, name: str, /, **fields: Value) -> None:
        """Offer an event to every watcher that may see its tunnel, and keep it. Never waits, never raises."""
        owner = self._owner_of(str(fields.get("id")))
        watchers = [*self._watchers.get(EVERYTHING, ()), *self._watchers.get(owner, ())]
        if watchers or self._keeper is not None:
            event = self.make(name, **fields)
            for watcher in watchers:
                watcher.offer(event)
            if self._keeper is not None:
                self._keeper.keep(event, owner)
                self.refresh_watched()

    def make(self, name: str, /, **fields: Value) -> Event:
        """An event of this moment."""
        return Event(time=datetime.now(UTC).isoformat(timespec="milliseconds"), event=name, **fields)

    def keep_in(self, keeper: EventKeeper) -> None:
        """Keep all events from now on."""
        self._keeper = keeper
        self.refresh_watched()

    def refresh_watched(self) -> None:
        """There may be more watchers than before or fewer, or the keeper wants something else."""
        self.watched = bool(self._watchers) or (self._keeper is not None and self._keeper.wants_visitors)

    def check_limit(self, grant: Grant, limit: int) -> None:
        """Raise `LimitReachedError` where the credential of `grant` has `limit` watchers."""
        running = sum(watcher.credential == grant.name for group in self._watchers.values() for watcher in group)
        if running >= limit:
            name = grant.title if grant.name else "this relay"
            raise LimitReachedError(f"watch limit reached: {name} has {running} of {limit} open (control.max_watchers)")

    @asynccontextmanager
    async def watch(
        self, backlog: int, grant: Callable[[], Grant | None] = lambda: EVERYBODY, tunnel: str | None = None
    ) -> AsyncIterator[Watcher]:
        """Subscribe for the length of the block to the events of the tunnels that `grant` may see, or of one `tunnel`.
        `backlog` events are queued.
        """
        watcher = Watcher(backlog, grant, tunnel)
        self._add(watcher)
        try:
            yield watcher
        finally:
            self._remove(watcher)

    def refresh(self) -> None:
        """The credentials may have changed: read the grants of all watchers again."""
        for watcher in [watcher for group in self._watchers.values() for watcher in group]:
            self._remove(watcher)
            self._add(watcher)

    def _add(self, watcher: Watcher) -> None:
        grant = watcher.grant()
        if grant is None:
            watcher.end()
        else:
            watcher.key = EVERYTHING if grant.sees_all else grant.name
            watcher.credential = grant.name
            self._watchers.setdefault(watcher.key, set()).add(watcher)
            self.refresh_watched()

    def _remove(self, watcher: Watcher) -> None:
        group = self._watchers.get(watcher.key, set())
        group.discard(watcher)
        if not group:
            self._watchers.pop(watcher.key, None)
            self.refresh_watched()
