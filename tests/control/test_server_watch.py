"""A watch: how it ends, and that its stream is closed each time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import LineClient, running_server
from tests.support.people import connect, reset
from tunneld.config.schema import ControlSettings

LONG = 1e6
"""Seconds of a clock that the test moves by hand."""


async def watch(client: LineClient, line: str = "watch") -> None:
    await client.send(line)
    heard = [await client.read_line() for _ in range(3)]
    assert heard == ["* event=watching", "* event=opened id=t1", '* event=closed id=t1 reason="ttl is over"']


async def test_a_watch_ends_when_a_line_is_typed() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        assert await client.request("") == "OK watched"
        assert await client.request("echo on") == "OK on"
        assert (server.script.streams, server.script.streams_closed) == (1, 1)


async def test_a_request_ends_a_watch_and_is_carried_out() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        await client.send("echo next")
        assert [await client.read_line(), await client.read_line()] == ["OK watched", "OK next"]


async def test_a_watch_after_a_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        await client.send("watch")
        assert await client.read_line() == "OK watched"
        assert await client.read_line() == "* event=watching"
        assert await client.request("") == "OK watched"
        assert (server.script.streams, server.script.streams_closed) == (2, 2)


async def test_what_was_typed_ahead_ends_a_watch_at_once() -> None:
    async with running_server() as server, server.client() as client:
        await client.send(b"watch\necho next\n")
        assert [await client.read_line() for _ in range(3)] == ["* event=watching", "OK watched", "OK next"]


async def test_the_end_of_a_watcher_ends_its_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client)
        assert isinstance(client.stream, trio.SocketStream)
        await client.stream.send_eof()
        assert await client.read_all() == ["OK watched"]
        assert server.script.streams_closed == 1


async def test_a_watcher_that_breaks_off_ends_its_watch() -> None:
    async with running_server() as server:
        stream = await connect(server.endpoint)
        client = LineClient(stream)
        await client.read_line()
        await watch(client)
        reset(stream)
        await wait_all_tasks_blocked(0.005)
        assert server.script.streams_closed == 1


async def test_a_stream_that_ends_by_itself_ends_the_watch() -> None:
    async with running_server() as server, server.client() as client:
        await watch(client, "watch once")
        assert await client.read_line() == "OK watched"
        assert await client.request("echo on") == "OK on"


async def test_a_stream_that_fails_is_a_refusal() -> None:
    async with running_server() as server, server.client() as client:
        await client.send("watch-and-fail")
        assert [await client.read_line(), await client.read_line()] == [
            "* event=opened id=t1",
            "ERR no-such-tunnel no tunnel t1",
        ]
        assert await client.request("echo on") == "OK on"


@pytest.mark.parametrize("how", ["stops reading", "breaks off"])
async def test_a_watcher_lost_in_the_middle_of_an_event_ends_its_watch(mock_clock: MockClock, how: str) -> None:
    async with running_server(ControlSettings(write_timeout=30.0), patience=LONG) as server:
        stream = await connect(server.endpoint)
        await stream.send_all(b"watch-forever\n")
        await wait_all_tasks_blocked(0.01)
        assert (server.script.streams, server.script.streams_closed) == (1, 0)
        if how == "breaks off":
            reset(stream)
        else:
            mock_clock.jump(31)
        await wait_all_tasks_blocked(0.01)
        assert server.script.streams_closed == 1
        await stream.aclose()


async def test_typing_never_cuts_an_event(mock_clock: MockClock) -> None:
    async with running_server(patience=LONG) as server, server.client() as client:
        await client.send("watch-forever")
        await wait_all_tasks_blocked(0.01)  # an event is half sent by now
        await client.send("echo next")
        events, verdict, answer = set(), "", ""
        while not answer:
            line = await client.read_line()
            if line.startswith("*"):
                events.add(line)
            elif verdict:
                answer = line
            else:
                verdict = line
        assert events == {"* event=" + "x" * 10_000}
        assert (verdict, answer) == ("OK", "OK next")
