"""Past events: what is kept, for which credential, within which bounds, and how they lead on to the present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tunneld.directory import event_history
from tunneld.directory.event_database import PAGE, EventDatabase, EventQuery, PastEvent
from tunneld.directory.event_history import EventHistory
from tunneld.errors import StoreError
from tunneld.tunnel.events import Events

OWNERS = {"t1": "alice", "t2": "bob", "t3": "alice"}
NAMES = {"t1": "blog", "t3": "blog"}


@dataclass
class Kept:
    max_kept: int = 1000
    max_age: float = 1000.0
    connections: bool = True


@dataclass
class HistoryBench:
    """The history of one relay after another, in the same folder."""

    folder: Path
    settings: Kept = field(default_factory=Kept)
    now: float = 1e9
    events: Events = field(default_factory=lambda: Events(OWNERS.get))
    history: EventHistory = field(init=False)

    async def start(self, nursery: trio.Nursery) -> None:
        self.events = Events(OWNERS.get)
        self.history = EventHistory(lambda: self.settings, self.folder, self.events, NAMES.get, lambda: self.now)
        await nursery.start(self.history.run)

    async def read(self, **query: object) -> Sequence[str]:
        """Each event as its name and its tunnel."""
        reader, found = self.history.reader(EventQuery(**{"since": 0.0, **query})), []  # type: ignore[arg-type]
        while page := await reader.next_page():
            found += [f"{item['event']} {item.get('id', '-')}" for item in page]
        return found


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery) -> HistoryBench:
    bench = HistoryBench(tmp_path)
    await bench.start(nursery)
    return bench


async def test_events_survive_a_restart_in_their_order(tmp_path: Path) -> None:
    bench = HistoryBench(tmp_path)
    for number in (1, 2):
        async with trio.open_nursery() as nursery:
            await bench.start(nursery)
            bench.events.publish("opened", id=f"t{number}")
            bench.events.publish("closed", id=f"t{number}")
            nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        await bench.start(nursery)
        bench.events.publish("progress")
        assert await bench.read() == ["opened t1", "closed t1", "opened t2", "closed t2", "progress -"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("stored", [False, True])
async def test_a_credential_reads_the_events_of_its_own_tunnels(bench: HistoryBench, stored: bool) -> None:
    for tunnel in ("t1", "t2", None, "t3"):
        bench.events.publish("closed", id=tunnel)
    if stored:
        await bench.history.flush()
    assert await bench.read(owner="alice") == ["closed t1", "closed t3"]
    assert await bench.read(owner="bob") == ["closed t2"]
    assert len(await bench.read()) == 4
    assert await bench.read(tunnel="t3", opened=0.0, name="blog", name_owner="alice") == ["closed t1", "closed t3"]
    assert await bench.read(tunnel="t2") == ["closed t2"]
    assert await bench.read(tunnel="t2", opened=bench.now + 1) == []  # of an earlier process
    assert await bench.read(owner="bob", tunnel="t1", name="blog") == []
    assert await bench.read(since=bench.now + 1) == []


async def test_history_leads_on_to_the_present_without_a_gap(bench: HistoryBench) -> None:
    for number in range(PAGE + 10):
        bench.events.publish("opened", id="t1", number=number)
        if number == PAGE // 2:
            await bench.history.flush()
    seen: list[object] = []
    reader, published = bench.history.reader(EventQuery(0.0)), PAGE + 10
    while page := await reader.next_page():
        seen += [item["number"] for item in page]
        if published < 3 * PAGE:  # more of them come while it reads
            bench.events.publish("opened", id="t1", number=published)
            published += 1
            if published % 3 == 0:
                await bench.history.flush()
        if len(seen) > PAGE + 12:
            published = 3 * PAGE
            break
    rest = await reader.next_page()
    seen += [item["number"] for item in rest]
    async with bench.events.watch(10) as watcher:
        bench.events.publish("opened", id="t1", number=len(seen))
        (event,) = await anext(watcher)
        seen.append(event["number"])
    assert seen == list(range(len(seen)))


async def test_old_events_are_deleted_by_number_and_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_history, "TRIM_INTERVAL", 0.0)
    monkeypatch.setattr(event_history, "WRITE_INTERVAL", 0.0)
    bench = HistoryBench(tmp_path, Kept(max_kept=3))
    async with trio.open_nursery() as nursery:
        await bench.start(nursery)
        for _ in range(4):
            bench.events.publish("opened", id="t1")
        for _ in range(5):
            bench.events.publish("visitor", id="t2")
        bench.events.publish("closed", id="t1")
        while len(found := await bench.read()) > 6:
            await trio.lowlevel.checkpoint()
        assert found == ["opened t1"] * 2 + ["visitor t2"] * 3 + ["closed t1"]
        bench.now += bench.settings.max_age + 1
        bench.events.publish("closed", id="t2")
        while len(found := await bench.read()) > 1:
            await trio.lowlevel.checkpoint()
        assert found == ["closed t2"]
        nursery.cancel_scope.cancel()


async def test_a_flood_of_visitors_is_counted_and_not_built(
    bench: HistoryBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_history, "VISITOR_EVENTS_PER_WRITE", 10)
    await bench.history.flush()
    for _ in range(50):
        if bench.events.watched:
            bench.events.publish("visitor", id="t1")
        else:
            bench.events.unseen += 1
    bench.events.publish("closed", id="t1")
    await bench.history.flush()
    assert bench.events.watched
    assert await bench.read() == ["visitor t1"] * 10 + ["closed t1", "lost -"]
    (lost,) = [one.item for one in bench.history._pending] or [{}]
    assert lost.get("count", 40) == 40


@pytest.mark.parametrize("watched", [False, True])
async def test_connections_are_left_out_by_default(bench: HistoryBench, watched: bool) -> None:
    bench.settings.connections = False
    bench.history.reconfigure()
    assert not bench.events.watched
    async with bench.events.watch(10) if watched else trio.open_nursery():
        bench.events.publish("visitor", id="t1")
        bench.events.publish("closed", id="t1")
        await bench.history.flush()
    assert await bench.read() == ["closed t1"]


async def test_a_disk_that_fails_is_tried_again(bench: HistoryBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("events.db: disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(EventDatabase, "add", fail)
        bench.events.publish("opened", id="t1")
        await bench.history.flush()
    bench.events.publish("closed", id="t1")
    await bench.history.flush()
    assert bench.history._pending == []
    assert await bench.read() == ["opened t1", "closed t1"]


async def test_events_beyond_the_bound_are_lost_and_counted(
    bench: HistoryBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_history, "MAX_PENDING", 2)
    for _ in range(5):
        bench.events.publish("opened", id="t1")
    assert bench.history.lost == 3


async def test_without_a_folder_nothing_is_kept() -> None:
    events = Events()
    history = EventHistory(Kept, None, events, NAMES.get)
    async with trio.open_nursery() as nursery:
        await nursery.start(history.run)
        events.publish("opened", id="t1")
        assert not history.is_kept
        assert not events.watched
        assert await history.reader(EventQuery(0.0)).next_page() == []
        nursery.cancel_scope.cancel()


def test_a_page_ends_where_the_next_begins(tmp_path: Path) -> None:
    database = EventDatabase(tmp_path)
    database.add([PastEvent(number, 1.0, None, None, None, False, {"number": number}) for number in range(1, PAGE + 2)])
    first, after = database.read(EventQuery(0.0), 0, PAGE + 1)
    assert (len(first), after) == (PAGE, PAGE)
    assert database.read(EventQuery(0.0), after, PAGE + 1) == ([{"number": PAGE + 1}], PAGE + 1)
    database.close()
