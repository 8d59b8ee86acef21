"""Snapshots: bounded in cost, with rates, without secrets, and without tunnels that have closed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import trio
from trio.testing import MockClock

from tunneld.directory.reply import DescribedItems, Reply
from tunneld.directory.requester import Requester
from tunneld.errors import NotAllowedError, UsageError
from tunneld.http.page.feed import EVENT_GROUP_INTERVAL, TUNNELS_PER_TICK, VISITORS_SHOWN, Feed
from tunneld.policy.access import Grant, Role
from tunneld.wire.lines import ControlRequest, Item

INTERVAL = 2.0


class Relay:
    """Answers the verbs with what a test says."""

    def __init__(self) -> None:
        self.tunnels: dict[str, dict[str, Any]] = {}
        self.visitors: list[dict[str, Any]] = []
        self.described = 0
        self.asked: list[Requester] = []
        self.groups: list[list[Item]] = []
        self.past: list[list[Item]] | None = None  # None: it keeps no past events

    def open(self, *names: str) -> None:
        for name in names:
            self.tunnels[name] = {"id": name, "server": "tcp://relay:1/secret", "age": 5, "up": 0, "down": 0}

    def _describe(self, tunnel: dict[str, Any]) -> Item:
        self.described += 1
        return tunnel

    async def execute(self, request: ControlRequest, caller: Requester) -> Reply:
        await trio.lowlevel.checkpoint()
        self.asked.append(caller)
        match request.verb:
            case "list":
                return Reply(items=DescribedItems(list(self.tunnels.values()), self._describe))
            case "show" if request.args[0] in self.tunnels:
                return Reply(items=[self.tunnels[request.args[0]], *self.visitors])
            case "watch" if request.options and self.past is None:
                raise UsageError("this relay keeps no past events")
            case "watch":
                return Reply(stream=self._stream(self.past if request.options else None))
        raise NotAllowedError(request.verb)

    async def _stream(self, past: list[list[Item]] | None) -> AsyncGenerator[Sequence[Item], None]:
        yield [{"event": "watching", "id": "all"}]
        if past is not None:
            for group in past:
                yield group
            yield [{"event": "live"}]
        while self.groups:
            yield self.groups.pop(0)
        await trio.sleep_forever()


class Running:
    """A feed that takes snapshots while a test lets the time pass."""

    def __init__(self, nursery: trio.Nursery, relay: Relay) -> None:
        self.relay = relay
        self.feed = Feed(relay.execute, Grant("alice", Role.USER), lambda: INTERVAL)
        nursery.start_soon(self.feed.run)

    async def ticks(self, number: int = 1) -> None:
        for _ in range(number):
            await self.feed.tick()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(row.text) for name, row in self.feed.rows.items()}


async def test_a_snapshot_has_rates_and_no_secrets(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = Relay()
    relay.open("t1")
    running = Running(nursery, relay)
    await running.ticks()
    relay.tunnels["t1"]["up"] = 4000
    await running.ticks()
    row = running.rows["t1"]
    assert (row["up"], row["rate_up"], row["rate_down"]) == (4000, 1000, 0)
    assert "secret" not in json.dumps(row)
    assert {caller.known_grant.name for caller in relay.asked} == {"alice"}
    assert running.feed.status == {}  # refused to users


async def test_only_what_changes_has_a_new_version(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = Relay()
    relay.open("t1", "t2")
    running = Running(nursery, relay)
    await running.ticks()
    relay.tunnels["t2"] |= {"age": 7, "served": 1}
    relay.tunnels["t1"]["age"] = 7
    await running.ticks()
    assert [row.version for row in running.feed.rows.values()] == [1, 2]


async def test_a_tunnel_that_closed_is_gone_with_the_next_snapshot(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    relay = Relay()
    relay.open("t1", "t2")
    running = Running(nursery, relay)
    await running.ticks()
    del relay.tunnels["t1"]
    await running.ticks()
    assert (list(running.feed.rows), list(running.feed.gone)) == (["t2"], [(2, "t1")])


async def test_a_large_relay_is_described_in_turns(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay, number = Relay(), 2 * TUNNELS_PER_TICK + 3
    relay.open(*(f"t{index}" for index in range(number)))
    running = Running(nursery, relay)
    described = []
    for _ in range(4):
        before = relay.described
        await running.ticks()
        described.append(relay.described - before)
    assert described == [TUNNELS_PER_TICK, TUNNELS_PER_TICK, 3, TUNNELS_PER_TICK]
    assert len(running.feed.rows) == running.feed.total == number


async def test_tunnels_that_close_hide_no_other_in_a_large_relay(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    relay, number = Relay(), 2 * TUNNELS_PER_TICK
    relay.open(*(f"t{index}" for index in range(number)))
    running = Running(nursery, relay)
    await running.ticks(3)
    for index in range(10):
        del relay.tunnels[f"t{index}"]
    for _ in range(8):
        await running.ticks()
        assert running.feed.rows.keys() >= relay.tunnels.keys()
    assert running.feed.rows.keys() == relay.tunnels.keys()


async def test_visitors_of_a_wanted_tunnel_the_busiest_first(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = Relay()
    relay.open("t1")
    relay.visitors = [{"visitor": f"192.0.2.1:{port}", "up": 0, "down": 0} for port in range(VISITORS_SHOWN + 50)]
    running = Running(nursery, relay)
    running.feed.wanted["t1"] += 1
    await running.ticks()
    relay.visitors[-1]["down"] = 10**6
    await running.ticks()
    visitors: Any = running.feed.visitors["t1"]
    assert (visitors["total"], len(visitors["rows"])) == (VISITORS_SHOWN + 50, VISITORS_SHOWN)
    assert visitors["rows"][0]["visitor"] == relay.visitors[-1]["visitor"]
    running.feed.wanted["t1"] -= 1
    await running.ticks()
    assert (running.feed.visitors, running.feed.wanted) == ({}, {})


async def test_a_tunnel_that_may_not_be_seen_is_gone(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    running = Running(nursery, Relay())
    running.feed.wanted["t9"] += 1
    await running.ticks()
    assert running.feed.visitors["t9"]["gone"] is True


async def test_hurrying_takes_a_snapshot_early_but_not_at_will(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    running = Running(nursery, Relay())
    await running.ticks()
    began = trio.current_time()
    for _ in range(4):
        running.feed.hurry()
        await running.ticks()
    assert trio.current_time() - began == 2.0  # 4 × MIN_INTERVAL


async def test_a_flood_of_events_is_read_slowly(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = Relay()
    relay.groups = [[{"event": "visitor", "id": f"t{group}"}] for group in range(9)]
    running = Running(nursery, relay)
    await trio.sleep(4.5 * EVENT_GROUP_INTERVAL)
    assert [json.loads(text)["id"] for _, text in running.feed.events] == ["t0", "t1", "t2", "t3"]


async def test_past_events_come_first_and_at_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = Relay()
    relay.past = [[{"event": "opened", "id": f"t{group}"}] for group in range(9)]
    relay.groups = [[{"event": "closed", "id": "t0"}]]
    running = Running(nursery, relay)
    await trio.sleep(EVENT_GROUP_INTERVAL / 2)
    found = [json.loads(text) for _, text in running.feed.events]
    assert [event["id"] for event in found] == [f"t{group}" for group in range(9)]
    await trio.sleep(EVENT_GROUP_INTERVAL)
    assert json.loads(running.feed.events[-1][1])["event"] == "closed"
