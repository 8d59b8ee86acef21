"""Copies what passes, and parses the copies later: the relay never waits.

    relay ──► tap: copies ──► backlog ──► a task: conversation ──► store
                 ▲                              │
                 └── from which byte on copies are wanted again ◄┘      large bodies are not copied

What does not fit into the backlog is not copied. Each copy has its place in the connection, so a gap is noticed, and
either does not matter, because it is in a body of which enough is kept, or is noted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from tunneld.inspector.conversation import Conversation
from tunneld.inspector.framing import NotHttpError
from tunneld.inspector.records import REQUEST, RESPONSE
from tunneld.inspector.store import ExchangeStore
from tunneld.log import Logger

GATHER_DELAY: Final = 0.01
"""Seconds between the first copy and its parsing: more come meanwhile, and the relay is served first."""
SLICE: Final = 64 * 1024
"""Bytes parsed before the relay is served again: half a millisecond."""
HEAD_COST: Final = 4096
"""Bytes of it that each copy counts at least: a head takes as long as a large piece of a body."""
PROGRESS: Final = 1 << 20
"""Bytes of a body that is not copied after which its size is updated."""
COPY_COST: Final = 256
"""Bytes that a copy costs beside its own."""

log = Logger("inspector")


class ConnectionTap:
    """The tap of one connection. Implements `Tap`: called by the relay, so it only copies."""

    __slots__ = ("_is_over", "_recorder", "_seen", "_wanted", "conversation", "parsed")

    def __init__(self, recorder: Recorder, conversation: Conversation) -> None:
        self._recorder = recorder
        self.conversation: Conversation | None = conversation
        """None once it is not followed any more."""
        self.parsed = [0, 0]
        """Bytes of each side that are parsed or skipped."""
        self._seen = [0, 0]
        self._wanted = [0, 0]
        self._is_over = False

    def on_written(self, data: bytes | bytearray | memoryview) -> None:
        """See `Tap`."""
        if self.conversation is not None:
            self._copy(REQUEST, data)

    def on_read(self, data: bytes | bytearray | memoryview) -> None:
        """See `Tap`."""
        if self.conversation is not None:
            self._copy(RESPONSE, data)

    def end(self) -> None:
        """The connection has ended. May be called again."""
        if not self._is_over:
            self._is_over = True
            for side in (REQUEST, RESPONSE):
                self._recorder.put(self, side, self._seen[side], b"")
            self._recorder.put(self, None, 0, b"")

    def want_from(self, side: int, place: int) -> None:
        """Bytes before this place need not be copied."""
        self._wanted[side] = place

    def _copy(self, side: int, data: bytes | bytearray | memoryview) -> None:
        place = self._seen[side]
        after = self._seen[side] = place + len(data)
        wanted = self._wanted[side]
        if wanted <= place:
            self._recorder.put(self, side, place, bytes(data))
        elif wanted < after:
            self._recorder.put(self, side, wanted, bytes(data[wanted - place :]))
        elif wanted == after or place // PROGRESS != after // PROGRESS:
            self._recorder.put(self, side, after, b"")


class Recorder:
    """The backlog, and the task that parses it."""

    def __init__(self, store: ExchangeStore, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.unseen = 0
        """Connections that were not looked at, because there were too many."""
        self.connections = 0
        """Connections being looked at."""
        self._clock = clock
        self._backlog: deque[tuple[ConnectionTap, int | None, int, bytes, float]] = deque()
        self._size = 0
        self._filled = trio.Event()

    def tap(
        self, exposure: str, visitor: str, *, has_proxy_header: bool = False, replay_of: int | None = None
    ) -> ConnectionTap | None:
        """A tap for a new connection to the local server; None if there are too many. See also `Conversation`."""
        if self.connections >= self.store.limits.connections:
            self.unseen += 1
            return None
        self.connections += 1
        return ConnectionTap(
            self, Conversation(self.store, exposure, visitor, has_proxy_header=has_proxy_header, replay_of=replay_of)
        )

    def put(self, tap: ConnectionTap, side: int | None, place: int, data: bytes) -> None:
        """Called by taps: parse this later. Without a side, the connection has ended."""
        if data:
            if self._size + len(data) + COPY_COST > self.store.limits.backlog:
                return  # the next copy shows that these are missing
            self._size += len(data) + COPY_COST
        self._backlog.append((tap, side, place, data, self._clock()))
        self._filled.set()

    async def run(self) -> None:
        """Parse what is copied, until cancelled."""
        while True:
            await self._filled.wait()
            await trio.sleep(GATHER_DELAY)
            self._filled = trio.Event()
            while self._backlog:
                self.parse_slice()
                await trio.lowlevel.checkpoint()

    def parse_slice(self) -> None:
        """Parse a part of the backlog."""
        budget = SLICE
        while self._backlog and budget > 0:
            tap, side, place, data, now = self._backlog.popleft()
            self._size -= len(data) + COPY_COST if data else 0
            budget -= len(data) + HEAD_COST
            conversation = tap.conversation
            if side is None:
                self.connections -= 1
                tap.conversation = None
            if conversation is not None:
                self._parse(tap, conversation, side, place, data, now)

    def _parse(
        self, tap: ConnectionTap, conversation: Conversation, side: int | None, place: int, data: bytes, now: float
    ) -> None:
        try:
            if side is None:
                conversation.end(now)
                return
            if missing := place - tap.parsed[side]:
                conversation.skip(side, missing, now)
            if data:
                conversation.feed(side, data, now)
            tap.parsed[side] = place + len(data)
            for each in (REQUEST, RESPONSE):  # one may have decided how the other goes on
                tap.want_from(each, tap.parsed[each] + conversation.spare(each))
        except NotHttpError as error:
            tap.conversation = None
            conversation.give_up(str(error), now)
        except Exception as error:  # a bug must not end the agent
            tap.conversation = None
            log.exception("inspector failed: internal error", exc_info=error)
            conversation.give_up("internal error of the inspector", now)
