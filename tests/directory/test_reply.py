"""Long replies are made in steps over every interface, and other tasks run in between."""

from __future__ import annotations

import xmlrpc.client
from dataclasses import replace
from functools import partial

import pytest
import trio

from tests.http.support import running_http
from tests.support.control import Script, running_server
from tunneld.control.commands import COMMANDS
from tunneld.directory.reply import ITEMS_PER_STEP, DescribedItems, Reply
from tunneld.directory.requester import Requester
from tunneld.directory.turns import RequestTurns
from tunneld.http.responses import LongResponse
from tunneld.wire.lines import ControlRequest, Item

COUNT = 5 * ITEMS_PER_STEP + 1


class Turns:
    """Counts the turns of another task, and at which of them each item was made."""

    def __init__(self) -> None:
        self.now = 0
        self.made: list[int] = []

    async def run(self) -> None:
        while True:
            self.now += 1
            await trio.lowlevel.checkpoint()

    def describe(self, number: int) -> Item:
        self.made.append(self.now)
        return {"id": f"t{number}", "client": "tcp://relay.example.org:20001"}

    @property
    def took_turns(self) -> bool:
        """Whether the other task ran between the steps; Trio lets a task run twice before another's next turn."""
        most: int = max(map(self.made.count, self.made))
        return len(self.made) == COUNT and most <= 2 * ITEMS_PER_STEP


@pytest.fixture
async def turns(nursery: trio.Nursery) -> Turns:
    turns = Turns()
    nursery.start_soon(turns.run)
    return turns


@pytest.fixture
def many(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> Turns:
    """A relay whose `list` has many items."""

    async def list_many(_daemon: object, _request: ControlRequest, caller: Requester) -> Reply:
        step = partial(RequestTurns().step, caller)
        return Reply(text="done", items=DescribedItems(range(COUNT), turns.describe), step=step)

    monkeypatch.setitem(COMMANDS, "list", replace(COMMANDS["list"], run=list_many))
    monkeypatch.setattr(Script, "__call__", list_many)
    return turns


ITEMS = [{"id": f"t{number}", "client": "tcp://relay.example.org:20001"} for number in range(COUNT)]


async def test_items_are_described_when_they_are_needed() -> None:
    seen: list[int] = []

    def describe(number: int) -> Item:
        seen.append(number)
        return {"id": number}

    items = DescribedItems(range(10), describe)
    assert (len(items), bool(items), bool(DescribedItems([], describe)), seen) == (10, True, False, [])
    assert (items[3], list(items[8:]), seen) == ({"id": 3}, [{"id": 8}, {"id": 9}], [3, 8, 9])


async def test_lines_are_made_in_steps(many: Turns) -> None:
    async with running_server() as server, server.client() as client:
        await client.send("list")
        lines = [await client.read_line() for _ in range(COUNT + 1)]
    assert lines == [*(f"* id={item['id']} client={item['client']}" for item in ITEMS), "OK done"]
    assert many.took_turns


async def test_json_is_made_in_steps_and_is_one_object(many: Turns) -> None:
    async with running_http() as relay:
        answer = await relay.request("GET", "/api/v1/list")
    assert answer.json == {"text": "done", "items": ITEMS}
    assert many.took_turns


async def test_xml_is_made_in_steps_and_is_one_array(many: Turns) -> None:
    async with running_http() as relay:
        answer = await relay.call_xml(xmlrpc.client.dumps((), "tunnel.list"))
    assert xmlrpc.client.loads(answer.text)[0] == (ITEMS,)
    assert many.took_turns


async def test_a_long_body_is_sent_in_pieces_and_arrives_whole(many: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongResponse, "PIECE_BYTES", 1000)
    pieces = len(LongResponse([b"x" * 600] * 5, "text/plain")._pieces)
    assert pieces == 3
    async with running_http() as relay:
        answers = [await relay.request("GET", "/api/v1/list"), await relay.request("HEAD", "/api/v1/list")]
    assert answers[0].json == {"text": "done", "items": ITEMS}
    assert (answers[1].status, answers[1].body) == (200, b"")
    assert answers[0].headers["content-length"] == answers[1].headers["content-length"]
