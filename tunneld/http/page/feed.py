"""What the page shows, kept up to date while it is shown: snapshots of tunnels and visitors, and the latest events.

A feed is shared by all pages that see the same. It asks the verbs `list`, `show`, `status` and `watch`, with the grant
of that view, and its cost does not grow with the number of pages: at each tick it describes at most `TUNNELS_PER_TICK`
tunnels, in the steps of every other request, and serializes each once. A larger relay is described in several ticks.

    run
    ├─ sample       a snapshot at each tick
    └─ collect      events, as many as people can read
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from tunneld.directory.reply import ITEMS_PER_STEP, Execute, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import TunneldError, UsageError
from tunneld.http.page.rates import Rates
from tunneld.http.translate import as_fields
from tunneld.policy.access import Grant
from tunneld.wire.lines import ControlRequest, Item, Value

TUNNELS_PER_TICK = 256
"""Tunnels described in one tick: 16 steps, some 20 ms of a core."""

VISITORS_SHOWN = 200
"""Visitors of a tunnel that are sent: those with the most traffic at the moment. More do not fit on a screen."""

EVENTS_KEPT = 500
"""Events for pages that connect, or connect again: some screens, 100 KiB."""

EVENT_GROUP_INTERVAL = 0.25
"""Seconds between two groups of events that are read, of 64 at most: in a flood the rest is counted and left out."""

PAST_EVENTS = "1h"
"""How long ago the first events of a feed may be."""

MIN_INTERVAL = 0.5
"""Seconds between two snapshots at the least, however often pages open another tunnel."""

SECRET_KEYS = frozenset({"server"})
"""Keys of a tunnel that a page does not need: the server URI has the key of the tunnel in it."""


@dataclass(slots=True)
class TunnelRow:
    """A tunnel as it was last described."""

    text: str  # JSON
    version: int  # of the feed when the text changed
    seen: int  # the pass in which it was last found


class Feed:
    """The feed of one view. `version` grows with each change; a page remembers the one that it has seen."""

    def __init__(self, execute: Execute, view: Grant, interval: Callable[[], float]) -> None:
        """`interval` is the time in seconds between snapshots, asked for at each."""
        self.version = 0
        self.total = 0  # tunnels that the view may see
        self.rows: dict[str, TunnelRow] = {}  # by tunnel
        self.gone: deque[tuple[int, str]] = deque(maxlen=4 * TUNNELS_PER_TICK)  # tunnels that closed, with the version
        self.status: Item = {}  # empty if the view may not see it
        self.visitors: dict[str, Mapping[str, object]] = {}  # of the tunnels that a page has open, by tunnel
        self.wanted: Counter[str] = Counter()  # tunnels that pages have open
        self.epoch = secrets.token_hex(4)  # ids of events of another feed mean nothing to this one
        self.events: deque[tuple[int, str]] = deque(maxlen=EVENTS_KEPT)  # number and JSON
        self.event_count = 0
        self._execute = execute
        self._requester = Requester("", "http page", "", view)
        self._interval = interval
        self._rates = Rates()
        self._since: dict[str, int] = {}  # when each tunnel was opened, in seconds since 1970
        self._visitor_rates: dict[str, Rates] = {}  # by tunnel
        self._next = 0  # the index of the first tunnel of the next tick
        self._pass = 0
        self.has_failed = False
        self._ticked = trio.Event()
        self._early = trio.Event()

    def fail(self) -> None:
        """A bug has ended it: the pages that wait for it are to begin anew."""
        self.has_failed = True
        self._ticked.set()

    async def tick(self) -> None:
        """Wait for the next snapshot."""
        await self._ticked.wait()

    def hurry(self) -> None:
        """Take the next snapshot now: a page has opened another tunnel."""
        self._early.set()

    async def run(self) -> None:
        """Keep the feed up to date until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._collect)
            while True:
                await self._sample()
                self._ticked.set()
                self._ticked = trio.Event()
                await trio.sleep(min(MIN_INTERVAL, self._interval()))
                with trio.move_on_after(max(0.0, self._interval() - MIN_INTERVAL)):
                    await self._early.wait()
                self._early = trio.Event()

    # Snapshots

    async def _sample(self) -> None:
        reply = await self._ask("status")
        self.status = dict(reply.items[0]) if reply is not None else {}
        await self._describe_tunnels()
        for tunnel in list(self.visitors.keys() | self.wanted.keys()):
            if self.wanted[tunnel] > 0:
                self.visitors[tunnel] = await self._describe_visitors(tunnel)
            else:
                self.visitors.pop(tunnel, None)
                self._visitor_rates.pop(tunnel, None)
                del self.wanted[tunnel]
        self.version += 1

    async def _ask(self, verb: str, *args: str) -> Reply | None:
        """The reply to a request; None if it is refused."""
        try:
            return await self._execute(ControlRequest(verb, args, {}), self._requester)
        except TunneldError:
            return None

    async def _describe_tunnels(self) -> None:
        """Describe the next tunnels, and forget the ones that have closed."""
        reply = await self._ask("list")
        if reply is None:
            return
        self.total, first = len(reply.items), self._next
        self._next = first + TUNNELS_PER_TICK
        for item in await _made(reply, reply.items[first : self._next]):
            self._note(item)
        if self._next >= self.total:
            self._next = 0
            # While a pass takes several ticks, tunnels that close shift others out of its way: one pass more for them.
            self._forget(older_than=self._pass if first == 0 else self._pass - 1)
            self._pass += 1

    def _note(self, item: Item) -> None:
        tunnel, age = str(item["id"]), _number(item, "age")
        since = self._since.setdefault(tunnel, int(time.time()) - age)
        up, down = self._rates.of(tunnel, _number(item, "up"), _number(item, "down"), trio.current_time())
        fields = {key: value for key, value in as_fields(item).items() if key not in SECRET_KEYS and key != "age"}
        text = json.dumps({**fields, "since": since, "rate_up": up, "rate_down": down})
        row = self.rows.get(tunnel)
        if row is None or row.text != text:
            self.rows[tunnel] = TunnelRow(text, self.version + 1, self._pass)
        else:
            row.seen = self._pass

    def _forget(self, older_than: int) -> None:
        for tunnel in [tunnel for tunnel, row in self.rows.items() if row.seen < older_than]:
            del self.rows[tunnel], self._since[tunnel]
            self._rates.forget(tunnel)
            self.gone.append((self.version + 1, tunnel))

    async def _describe_visitors(self, tunnel: str) -> Mapping[str, object]:
        """The visitors of a tunnel with the most traffic, and how many there are."""
        reply = await self._ask("show", tunnel)
        if reply is None:
            return {"id": tunnel, "gone": True, "total": 0, "rows": []}
        rates, now = self._visitor_rates.setdefault(tunnel, Rates()), trio.current_time()
        rows: list[dict[str, Value]] = []
        for item in await _made(reply, reply.items[1:]):
            up, down = rates.of(str(item["visitor"]), _number(item, "up"), _number(item, "down"), now)
            rows.append({**as_fields(item), "rate_up": up, "rate_down": down})
        rates.retain({str(row["visitor"]) for row in rows})
        rows.sort(key=_traffic, reverse=True)
        return {"id": tunnel, "total": len(rows), "rows": rows[:VISITORS_SHOWN]}

    # Events

    async def _collect(self) -> None:
        """First the past events, where the relay keeps some, then those that happen."""
        past = {"since": PAST_EVENTS}
        while True:
            try:
                reply = await self._execute(ControlRequest("watch", (), past), self._requester)
                assert reply.stream is not None
                async with aclosing(reply.stream) as stream:
                    async for group in stream:
                        self._keep(group)
                        if any(event["event"] == "live" for event in group):
                            past = {}
                        if not past:
                            await trio.sleep(EVENT_GROUP_INTERVAL)
            except UsageError:
                past = {}
                continue
            except TunneldError:  # too many watchers
                pass
            await trio.sleep(self._interval())

    def _keep(self, events: Sequence[Item]) -> None:
        for event in events:
            if event["event"] not in {"watching", "live"}:
                self.event_count += 1
                self.events.append((self.event_count, json.dumps(as_fields(event))))


async def _made(reply: Reply, items: Sequence[Item]) -> Sequence[Item]:
    """The items, which are made in the steps of the reply."""
    made: list[Item] = []
    for first in range(0, len(items), ITEMS_PER_STEP):
        async with reply.step():
            made += items[first : first + ITEMS_PER_STEP]
    return made


def _number(item: Mapping[str, Value], key: str) -> int:
    return int(item[key] or 0)


def _traffic(row: Mapping[str, Value]) -> tuple[int, int]:
    return _number(row, "rate_up") + _number(row, "rate_down"), _number(row, "up") + _number(row, "down")
